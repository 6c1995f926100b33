"""The exported file itself, scored with ONNX Runtime on the CPU."""

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
        path: the file; one input (float32, [N, C, H, W]) and logits [N, K] as its first output.

    Raises:
        UsageError: the file is missing, is not an ONNX model, or takes a fixed number of images only.
        EnvironmentProblem: onnxruntime is not installed or is broken.
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
        """Logits [N, K] (float32) of images [N, C, H, W] in [0, 1]."""
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        try:
            return torch.from_numpy(self._session.run(None, {self._input: array})[0]).float()
        except Exception as error:  # onnxruntime raises classes of its own
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.path} does not run on images of {tuple(array.shape)}: {reason}") from error

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
