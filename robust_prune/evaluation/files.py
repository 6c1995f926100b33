"""Exported files of a model that are asked at every point that an attack on the model visits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..attacks.objectives import Watch
from ..errors import UsageError

ROUNDING = 1e-4
"""Of the standard deviation of the logits; float32 files differ by about 1e-6, fp16 files by 1e-3."""


class ExportedModel(Protocol):
    """Interface of an exported form of the model, such as its ONNX file, that is scored on the same images."""

    @property
    def key(self) -> str:
        """Hash of the file, so that stored results of another file are not used."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] (float32, on the CPU) of float32 images [N, C, H, W] in [0, 1]."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted classes [N] (int64, on the CPU) of such images; -1 where a logit is not finite."""
        ...


class FileVerdicts:
    """Which images of a batch the files classify correctly at all points that they were asked about.

    Args:
        files: the files, F of them.
        y: labels [N].
        standing: what is known before the attack, bool [F, N].

    Attributes:
        standing: as the argument, updated with every point; on the CPU.
    """

    def __init__(self, files: Sequence[ExportedModel], y: Tensor, standing: Tensor) -> None:
        self.files, self.y, self.standing = files, y.cpu(), standing.cpu().clone()

    @property
    def any_standing(self) -> Tensor:
        """Whether at least one file stands on each image, bool [N]."""
        return self.standing.any(dim=0)

    def watch(self, points: Tensor, rows: Tensor) -> None:
        """Ask every file about the points [M, C, H, W] of those images, at `rows` of the batch, on which it stands."""
        points, rows = points.detach().cpu(), rows.cpu()
        for index, file in enumerate(self.files):
            open_ = self.standing[index, rows].nonzero().flatten()
            if len(open_):
                asked = rows[open_]
                self.standing[index, asked] = file.predict(points[open_]) == self.y[asked]

    def of_rows(self, rows: Tensor) -> Watch:
        """Return `watch` for a part of the batch that consists of the images at `rows`."""
        return lambda points, among: self.watch(points, rows[among])


def differs(logits: Tensor, exported: Tensor) -> bool:
    """Return whether the logits [N, K] of a file differ from the model's by more than rounding in float32.

    Such a file, for instance in int8, is another function than the model, and attacks on the model are not yet attacks
    on it.
    """
    if exported.shape != logits.shape:
        raise UsageError(
            f"the exported file gives outputs {tuple(exported.shape)}, and the model {tuple(logits.shape)}, for the "
            "same images. Give the file of this model."
        )
    spread = logits.std().item()
    change = (exported.to(logits) - logits).abs().max().item()
    return not change <= ROUNDING * spread
