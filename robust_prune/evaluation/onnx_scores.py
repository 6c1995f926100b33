"""Predictions of an exported ONNX file, by ONNX Runtime on the CPU, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attacks.objectives import classify
from ..errors import UsageError
from ..machine.child import Child
from ..runs.files import file_sha256

OPENING_SECONDS, BYTES_A_SECOND = 10.0, 50e6
"""Time limit for opening a file, and for its first batch: a fixed part, and one that grows with the file's size."""
PATIENCE, LEAST_SECONDS = 30.0, 60.0
"""Time limit of later batches: a multiple of the time that the first took for each image, and at least this."""


class OnnxModel:
    """An ONNX classifier of [0, 1] images; an `ExportedModel` for `evaluate`.

    The file runs in a process that ends with this object; a file that crashes, or takes too much time or memory, is an
    error here.

    Args:
        path: the file; it has one float32 input [N, C, H, W], and its first output are logits [N, K].

    Attributes:
        path: path of the file.
        key: SHA-256 of the file.

    Raises:
        UsageError: the file is missing, is not an ONNX model, or has a fixed batch size.
        EnvironmentProblem: onnxruntime cannot be imported, or opening the file takes too long.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{self.path} does not exist. Export the model first.")
        self.key = file_sha256(self.path)
        self._limit = OPENING_SECONDS + self.path.stat().st_size / BYTES_A_SECOND
        self._tried = False
        self._child = Child(f"the process that runs {self.path}", "robust_prune.evaluation.onnx_worker")
        request = {"op": "open", "path": str(self.path.absolute()), "threads": torch.get_num_threads()}
        shape = self._child.ask(request, seconds=self._limit)[0]["shape"]
        if shape and isinstance(shape[0], int):
            raise UsageError(
                f"{self.path} takes batches of {shape[0]} only, its input being {shape}. Export it with a dynamic "
                "batch, as robust-prune export does."
            )

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] (float32, on the CPU) of images [N, C, H, W] in [0, 1].

        Raises:
            UsageError: the file does not run on images of this size.
            EnvironmentProblem: the process ended, or gave no answer in time.
        """
        if not self._tried and len(images):
            self._try(images[:1])
        return self._run(images)

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted classes [N] of images [N, C, H, W] in [0, 1]; -1 where a logit is not finite."""
        return classify(self.logits(images))

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _try(self, image: Tensor) -> None:
        """Run one image within the time limit of opening; later limits follow from its time."""
        begin = time.monotonic()
        self._run(image)
        self._tried, self._limit = True, max(LEAST_SECONDS, PATIENCE * (time.monotonic() - begin))

    def _run(self, images: Tensor) -> Tensor:
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        limit = self._limit * max(1, len(array) if self._tried else 1)
        request = {"op": "run", "shape": list(array.shape)}
        answer, payload = self._child.ask(request, array.tobytes(), seconds=limit)
        return torch.from_numpy(np.frombuffer(bytearray(payload), np.float32).reshape(answer["shape"]))
