"""The same file in fewer bits: fp16, and int8 with quantised activations. ONNX Runtime's own tools do the work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ..data.base import ImageSet, first_images
from ..errors import EnvironmentProblem, QualityGateError, UsageError
from ..recipe import ExportSection
from ..runs.files import atomic_write, file_sha256
from .onnx import INPUT_NAME, MAX_EMBEDDED_BYTES, quiet
from .parity import check_images, check_parity, eval_copy, logits_of
from .types import MANIFEST_KEY, OnnxArtifact

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
LEAST_AGREEMENT = {"fp16": 0.98, "int8": 0.8}
"""Share of images on which a file must give the class of the float64 reference, or else it is broken. What it costs in
accuracy is measured afterwards, clean and robust."""
LARGEST_ERROR = {"fp16": 0.05, "int8": 0.5}
"""How far a logit may be off, as a share of the largest one: values that do not fit are cut off in silence."""
CALIBRATION_BATCH = 16


def export_precisions(
    model: nn.Module, images: ImageSet, source: Path, section: ExportSection
) -> dict[Precision, OnnxArtifact]:
    """The files of lower precision that `section` wants, beside the fp32 file at `source`; from training images."""
    few, _ = first_images(images, section.calibration_images)
    return {
        precision: export_reduced(source, reduced_path(source, precision), precision, model, few)
        for precision in section.precisions
    }


def reduced_path(source: Path, precision: Precision) -> Path:
    """Where a file of lower precision lies: ``model.int8.onnx`` beside ``model.onnx``."""
    return source.with_name(f"{source.stem}.{precision}{source.suffix or '.onnx'}")


def export_reduced(
    source: str | Path, path: str | Path, precision: Precision, model: nn.Module, images: Tensor
) -> OnnxArtifact:
    """Writes a file that `export_onnx` made once more in lower precision, checked before it appears.

    Inputs and outputs stay float32.

    - ``fp16``: weights and arithmetic in half precision (onnxruntime.transformers.float16).
    - ``int8``: static quantisation in QDQ form, weights per channel in int8, activations in uint8 with ranges from
      `images` (onnxruntime.quantization).

    Args:
        source: the fp32 file.
        path: the file to write; replaced only when the gate holds.
        precision: ``fp16`` or ``int8``.
        model: that `source` was made from.
        images: float [N, C, H, W] in [0, 1], N >= 9: training images, for the ranges and for the gate. A hundred or
            more give sound ranges.

    Returns:
        What was written. Its parity says how far the logits are from the float64 reference, and on how many images the
        class is the same; it passes within `LEAST_AGREEMENT` and `LARGEST_ERROR`.

    Raises:
        UsageError: an unknown precision, a missing file, or one whose weights lie outside of it (above 1.8 GB).
        QualityGateError: the file does not run at every batch size, or its classes are others; nothing is left.
        EnvironmentProblem: onnxruntime cannot convert it.
    """
    source, path = Path(source), Path(path)
    if precision not in LEAST_AGREEMENT:
        raise UsageError(f"precision must be one of {', '.join(LEAST_AGREEMENT)}, got {precision!r}")
    if not source.is_file():
        raise UsageError(f"{source} does not exist. Export the model in fp32 first.")
    if source.stat().st_size > MAX_EMBEDDED_BYTES or list(source.parent.glob(f"{source.name}.*.data")):
        raise UsageError(f"{source.name} is above 1.8 GB, which {precision} conversion does not support.")
    check_images(images)
    try:
        with quiet():
            converted = _half(source) if precision == "fp16" else _quantised(source, images)
    except Exception as error:  # the tools raise whatever their steps raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(f"onnxruntime cannot convert {source.name} to {precision}: {reason}") from error
    _keep_manifest_only(converted, precision)
    largest = float(logits_of(eval_copy(model, torch.float32), images.detach().cpu().float()).abs().max())
    parities = []

    def write(part: Path) -> None:
        onnx.save(converted, part)
        found = check_parity(part, model, images)
        close = found.onnx_error <= LARGEST_ERROR[precision] * largest
        passed = close and found.argmax_agreement >= LEAST_AGREEMENT[precision]
        parities.append(replace(found, passed=passed))
        if not passed:
            raise QualityGateError(
                f"the {precision} file gives the model's class on {100 * found.argmax_agreement:.1f} % of "
                f"{found.images} images (wanted: {100 * LEAST_AGREEMENT[precision]:.0f} %), its logits are off by "
                f"{found.onnx_error:.2g} (wanted: {LARGEST_ERROR[precision] * largest:.2g}). It was not kept."
            )

    atomic_write(path, write)
    opset = next(entry.version for entry in converted.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxArtifact(
        path=str(path),
        bytes=path.stat().st_size,
        opset=opset,
        sha256=file_sha256(path),
        flushed_subnormals=0,
        parity=parities[0],
        precision=precision,
    )


def _half(source: Path) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    return converted


def _quantised(source: Path, images: Tensor) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder:
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            _reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantised)


def _reader(images: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.detach().cpu().float().split(CALIBRATION_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT_NAME: np.ascontiguousarray(batch.numpy())}

    return Reader()


def _keep_manifest_only(model: onnx.ModelProto, precision: str) -> None:
    """Drops what the tools note about themselves, and says the precision in our manifest."""
    manifest: dict[str, Any] = next((json.loads(p.value) for p in model.metadata_props if p.key == MANIFEST_KEY), {})
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = MANIFEST_KEY, json.dumps({**manifest, "precision": precision}, sort_keys=True)
