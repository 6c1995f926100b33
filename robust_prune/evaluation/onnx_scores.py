"""Predictions of an exported ONNX file, by ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.objectives import classify
from ..errors import EnvironmentProblem, UsageError
from ..runs.files import file_sha256


class OnnxModel:
    """An ONNX classifier of [0, 1] images; an `ExportedModel` for `evaluate`.

    Args:
        path: the file; it has one float32 input [N, C, H, W], and its first output are logits [N, K].

    Attributes:
        path: path of the file.
        key: SHA-256 of the file.

    Raises:
        UsageError: the file is missing, is not an ONNX model, or has a fixed batch size.
        EnvironmentProblem: onnxruntime cannot be imported.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path} does not exist. Export the model first.")
        self._session = _session(self.path)
        taken = self._session.get_inputs()[0]
        self._input = taken.name
        if taken.shape and isinstance(taken.shape[0], int):
            raise UsageError(
                f"{self.path} takes batches of {taken.shape[0]} only, its input being {taken.shape}. Export it with a "
                "dynamic batch, as robust-prune export does."
            )
        self.key = file_sha256(self.path)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] (float32, on the CPU) of images [N, C, H, W] in [0, 1].

        Raises:
            UsageError: the file does not run on images of this size.
        """
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        try:
            return torch.from_numpy(self._session.run(None, {self._input: array})[0]).float()
        except Exception as error:  # onnxruntime raises classes of its own
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.path} does not run on images of {tuple(array.shape)}: {reason}") from error

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted classes [N] of images [N, C, H, W] in [0, 1]; -1 where a logit is not finite."""
        return classify(self.logits(images))


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(f"onnxruntime cannot be imported ({error}). Run: robust-prune doctor") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Worker threads would otherwise spin between batches and slow down the attack on the torch model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises unrelated classes for an unreadable model
        raise UsageError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from error
