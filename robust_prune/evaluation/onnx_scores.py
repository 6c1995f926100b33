"""The exported file itself, scored with ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EnvironmentProblem, UsageError
from ..run_dir import file_sha256
from .card import Accuracy
from .scoring import classify


class OnnxTwin:
    """An ONNX classifier of [0, 1] images; a `Twin` for `evaluate_with_twin`.

    Args:
        path: the file; one input (float32, [N, C, H, W]) and logits [N, K] as its first output.

    Raises:
        UsageError: the file is missing or is not an ONNX model.
        EnvironmentProblem: onnxruntime is not installed or is broken.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path} does not exist. Export the model first.")
        self._session = _session(self.path)
        self._input = self._session.get_inputs()[0].name
        self.key = file_sha256(self.path)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, K] (float32) of images [N, C, H, W] in [0, 1]."""
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        return torch.from_numpy(self._session.run(None, {self._input: array})[0]).float()

    def predict(self, images: Tensor) -> Tensor:
        """Classes [N] of the same; -1 where a logit is not finite."""
        return classify(self.logits(images))


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(f"onnxruntime cannot be imported ({error}). Run: robust-prune doctor") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its worker threads would otherwise keep spinning between batches and slow the attack on the torch model down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes for an unreadable model
        raise UsageError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from error


def score_onnx(path: Path | str, x: Iterable[Tensor], y: Iterable[Tensor]) -> Accuracy:
    """Accuracy of an ONNX file on given images, on the CPU.

    Args:
        path: the file.
        x: batches of float32 images [B, C, H, W] in [0, 1]: clean ones, or adversarial ones made on the torch model.
        y: the batches' labels [B].

    Raises:
        UsageError: the file is missing or unreadable, or batches and labels do not match.
    """
    twin = OnnxTwin(path)
    correct = total = 0
    try:
        for images, labels in zip(x, y, strict=True):
            if len(images) != len(labels):
                raise UsageError(f"a batch has {len(images)} images but {len(labels)} labels")
            correct += int((twin.predict(images) == labels.cpu()).sum())
            total += len(labels)
    except ValueError as error:
        raise UsageError(f"images and labels must come in the same number of batches ({error})") from error
    return Accuracy(correct, total)
