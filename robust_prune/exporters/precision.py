"""Conversion of ONNX files to fp16 and int8 by ONNX Runtime's tools."""

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

from ..data.base import ImageSet, stratified_images
from ..errors import EnvironmentProblem, QualityGateError, UsageError
from ..recipe import ExportSection
from ..runs.files import atomic_write, file_sha256
from .onnx import INPUT_NAME, MAX_EMBEDDED_BYTES, quiet
from .parity import check_images, check_parity, eval_copy, logits_of
from .types import MANIFEST_KEY, OnnxArtifact

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
LEAST_AGREEMENT = {"fp16": 0.98, "int8": 0.8}
"""Smallest share in [0, 1] of images on which a valid file predicts the class of the float64 reference. Its clean and
robust accuracy are measured afterwards."""
LARGEST_ERROR = {"fp16": 0.05, "int8": 0.5}
"""Largest error of a logit as a share of the largest logit; the tools clip values out of range without a warning."""
CALIBRATION_BATCH = 16


def export_precisions(
    model: nn.Module, images: ImageSet, source: Path, section: ExportSection
) -> dict[Precision, OnnxArtifact]:
    """Write the files of lower precision that the recipe asks for, next to the fp32 file.

    Args:
        model: the torch model of `source`.
        images: training images, for calibration and the parity check.
        source: the fp32 file.
        section: export section of the recipe, with precisions and number of calibration images.

    Returns:
        The artifact of each precision.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `export_reduced`.
    """
    few, _ = stratified_images(images, section.calibration_images)
    return {
        precision: export_reduced(source, reduced_path(source, precision), precision, model, few)
        for precision in section.precisions
    }


def reduced_path(source: Path, precision: Precision) -> Path:
    """Return the path of a file of lower precision, e.g. ``model.int8.onnx`` for ``model.onnx``."""
    return source.with_name(f"{source.stem}.{precision}{source.suffix or '.onnx'}")


def export_reduced(
    source: str | Path, path: str | Path, precision: Precision, model: nn.Module, images: Tensor
) -> OnnxArtifact:
    """Convert a file written by `export_onnx` to lower precision, after a parity check.

    Inputs and outputs are float32.

    - ``fp16``: weights and arithmetic in half precision (onnxruntime.transformers.float16).
    - ``int8``: static quantisation in QDQ format, with int8 weights per channel and uint8 activations whose ranges are
      calibrated on `images` (onnxruntime.quantization).

    Args:
        source: the fp32 file.
        path: the file to write; an existing file is replaced only if the parity check passes.
        precision: ``fp16`` or ``int8``.
        model: the torch model of `source`.
        images: training images for calibration and the parity check, float [N, C, H, W] in [0, 1], N >= 9; a hundred or
            more give reliable ranges.

    Returns:
        The artifact. Its parity has the largest error of a logit against the float64 reference and the share of images
        with the same class; it passes within `LEAST_AGREEMENT` and `LARGEST_ERROR`.

    Raises:
        UsageError: the precision is unknown, the images are unsuitable, the file is missing, or its weights exceed
            1.8 GB and are stored outside of it.
        QualityGateError: the file fails at a batch size, or its logits or classes differ too much; nothing is written.
        EnvironmentProblem: onnxruntime cannot convert the file.
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
    except Exception as error:  # the tools raise errors of many kinds
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
            # CPUs without VNNI add two products in 16 bits, in which those of 8-bit weights saturate.
            reduce_range=True,
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
    """Remove the tools' metadata and records the precision in our manifest."""
    manifest: dict[str, Any] = next((json.loads(p.value) for p in model.metadata_props if p.key == MANIFEST_KEY), {})
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = MANIFEST_KEY, json.dumps({**manifest, "precision": precision}, sort_keys=True)
