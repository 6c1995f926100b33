"""What an export leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_KEY = "robust_prune"
"""Under which an ONNX file's metadata holds our manifest."""


@dataclass(frozen=True)
class Parity:
    """Outcome of the parity gate between the ONNX file and the torch model.

    Attributes:
        batch_sizes: batch sizes that were compared.
        images: number of distinct images.
        onnx_error: largest absolute difference of the file's logits to the float64 reference.
        torch_error: the same of the torch model in float32.
        argmax_agreement: share of images, in [0, 1], on which ONNX and the reference predict the same class.
        passed: whether the gate holds.
    """

    batch_sizes: tuple[int, ...]
    images: int
    onnx_error: float
    torch_error: float
    argmax_agreement: float
    passed: bool


@dataclass(frozen=True)
class OnnxArtifact:
    """An exported, checked ONNX file.

    Attributes:
        path: where it lies.
        bytes: file size.
        opset: operator set version.
        sha256: of the file.
        flushed_subnormals: weights that were subnormal and are now zero.
        parity: outcome of the gate.
        precision: ``fp32``, ``fp16`` or ``int8``.
    """

    path: str
    bytes: int
    opset: int
    sha256: str
    flushed_subnormals: int
    parity: Parity
    precision: str = "fp32"
