"""An exported file, for the tests of exporters."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.export_sample import Small, images, small

from robust_prune.exporters.onnx import export_onnx
from robust_prune.exporters.types import OnnxArtifact


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Path, OnnxArtifact]:
    model = small()
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    artifact = export_onnx(
        model, path, images(), manifest={"arch": "cifar/small", "metrics": {"clean": 0.5}}, class_names=list("abcde")
    )
    return model, path, artifact
