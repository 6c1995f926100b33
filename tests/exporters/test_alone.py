"""Exported files of pruned models run where only onnxruntime and numpy are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.plans import halved, spec_of

from robust_prune.exporters.onnx import export_onnx
from robust_prune.exporters.precision import export_reduced
from robust_prune.models import registry

MODELS = {"cifar/resnet20_x2": 32, "cifar/resnet18": 32, "cifar/mobilevit_xs": 32, "timm/vit_tiny_patch16_224": 224}
RUN = """
import sys, numpy as np, onnxruntime
from importlib.metadata import distributions
assert not {"torch", "onnx", "timm", "robust-prune"} & {d.metadata["Name"].lower() for d in distributions()}
images = np.load(sys.argv[1])
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.save(path + ".npy", session.run(None, {"images": images})[0])
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy"], check=True)
    return python


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("arch", MODELS)
def test_pruned_files_run_with_onnxruntime_and_numpy_alone(arch: str, bare_python: Path, tmp_path: Path) -> None:
    size = MODELS[arch]
    torch.manual_seed(0)
    model = halved(registry.build(spec_of(arch, size)).eval(), size).model.eval()
    images = torch.rand(9, 3, size, size, generator=torch.Generator().manual_seed(0))
    export_onnx(model, tmp_path / "fp32.onnx", images, manifest={})
    for precision in ("fp16", "int8"):
        export_reduced(tmp_path / "fp32.onnx", tmp_path / f"{precision}.onnx", precision, model, images)
    np.save(tmp_path / "images.npy", images.numpy())
    files = [str(tmp_path / f"{precision}.onnx") for precision in ("fp32", "fp16", "int8")]
    done = subprocess.run(
        [bare_python, "-I", "-c", RUN, str(tmp_path / "images.npy"), *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = model(images).numpy()
    for file, limit in zip(files, (1e-4, 0.02, 0.5), strict=True):
        error = np.abs(np.load(f"{file}.npy") - expected).max() / np.abs(expected).max()
        assert error < limit, f"{file} is off by {error:.2g} of the largest logit"
