"""Results of an export."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_KEY = "robust_prune"
"""Key of our manifest in the metadata of an ONNX file."""


@dataclass(frozen=True)
class Parity:
    """Result of the parity check between an ONNX file and its torch model.

    Attributes:
        batch_sizes: batch sizes that were compared.
        images: number of distinct images.
        onnx_error: largest absolute difference of a logit of the file from the float64 reference.
        torch_error: largest absolute difference of a logit of torch in float32 from that reference.
        argmax_agreement: share in [0, 1] of predictions on which the file and the reference agree.
        passed: whether the check passed.
    """

    batch_sizes: tuple[int, ...]
    images: int
    onnx_error: float
    torch_error: float
    argmax_agreement: float
    passed: bool


@dataclass(frozen=True)
class OnnxArtifact:
    """An exported ONNX file that passed the parity check.

    Attributes:
        path: path of the file.
        bytes: size of the file and its external data in bytes.
        opset: version of the ONNX operator set.
        sha256: SHA-256 of the file.
        flushed_subnormals: number of subnormal weights that were set to zero.
        parity: result of the parity check.
        precision: ``fp32``, ``fp16`` or ``int8``.
    """

    path: str
    bytes: int
    opset: int
    sha256: str
    flushed_subnormals: int
    parity: Parity
    precision: str = "fp32"
