"""Writes a model as one ONNX file that plain ONNX Runtime runs at any batch size, and proves it equal."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from ..data.base import ImageSet, first_images
from ..errors import QualityGateError, UsageError
from ..models.spec import ModelSpec
from ..recipe import ExportSection
from ..runs.files import atomic_write, file_sha256
from ..serialization import to_json
from .parity import check_images, check_parity, eval_copy, logits_of
from .types import MANIFEST_KEY, OnnxArtifact, Parity

MIN_OPSET = 18
PARITY_IMAGES = 16
INPUT_NAME, OUTPUT_NAME = "images", "logits"
# Protobuf refuses messages of 2 GiB; the graph itself needs some room too.
MAX_EMBEDDED_BYTES = 1_800_000_000
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def export_model(
    model: nn.Module, spec: ModelSpec, images: ImageSet, path: str | Path, section: ExportSection, seed: int
) -> OnnxArtifact:
    """`export_onnx` with a manifest that names the model, checked on the first of `images` (training images)."""
    few, _ = first_images(images, PARITY_IMAGES)
    manifest = {"model": to_json(spec), "seed": seed}
    return export_onnx(model, path, few, manifest=manifest, opset=section.opset, class_names=spec.class_names)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    manifest: dict[str, Any],
    opset: int = MIN_OPSET,
    class_names: Sequence[str] = (),
) -> OnnxArtifact:
    """Exports `model` to `path` with a dynamic batch, checked against a float64 reference before it appears.

    The model is copied to the CPU in float32, contiguous and in eval mode; the caller's stays as it was. The
    file's input is ``images`` (float32 [batch, C, H, W] in [0, 1]) and its output ``logits`` ([batch,
    classes]). Weights that are subnormal after batch-norm folding become zero: they change no logit and
    slow some CPUs down. Weights above 1.8 GB in all go to a ``.data`` file beside it.

    Args:
        model: gives logits [N, classes] for images in [0, 1] (normalization is inside).
        path: the file to write; replaced only when the gate holds.
        images: float [N, C, H, W] in [0, 1], N >= 9: real training images, for the gate and the input shape.
        manifest: JSON values kept in the file's metadata under ``robust_prune``.
        opset: ONNX operator set, >= 18.
        class_names: names of the logits, kept in the manifest; may be empty.

    Returns:
        What was written and the outcome of the gate.

    Raises:
        UsageError: an opset that cannot be written, unsuitable images, or a model that the exporter refuses.
        QualityGateError: the file's outputs differ from the model's; nothing is left at `path`.
        EnvironmentProblem: the folder is not writable.
    """
    path = Path(path)
    if opset < MIN_OPSET:
        raise UsageError(f"opset must be >= {MIN_OPSET} (older sets lack operators we need), got {opset}. Try 18.")
    check_images(images)
    images = images.detach().to("cpu", torch.float32).contiguous()
    reference = eval_copy(model, torch.float32)
    classes = logits_of(reference, images[:2]).shape[1]
    if class_names and len(class_names) != classes:
        raise UsageError(f"got {len(class_names)} class names for a model with {classes} logits")
    graph = _trace(reference, images[:2], opset)
    _strip(graph)
    flushed = _flush_subnormals(graph)
    graph.metadata_props[MANIFEST_KEY] = _manifest_text(manifest, images, class_names)
    checked: list[Parity] = []

    data = _data_files(graph, path)
    fresh = [file for file in data if not file.exists()]

    def write(part: Path) -> None:
        try:
            ir.save(graph, part, format="protobuf", external_data=data[0].name if data else None)
            checked.append(_gate(part, path, reference, images))
        except BaseException:
            for file in fresh:
                file.unlink(missing_ok=True)
            raise

    atomic_write(path, write)
    for old in set(path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.data")) - set(data):
        old.unlink()
    return OnnxArtifact(
        path=str(path),
        bytes=sum(p.stat().st_size for p in (path, *data)),
        opset=opset,
        sha256=file_sha256(path),
        flushed_subnormals=flushed,
        parity=checked[0],
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest that `export_onnx` stored in a file; empty for a file that has none.

    Raises:
        UsageError: the file is missing or no ONNX file.
    """
    try:
        stored = ir.load(path).metadata_props.get(MANIFEST_KEY, "{}")
        return dict(json.loads(stored))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except Exception as error:
        raise UsageError(f"{path} is not a readable ONNX file") from error


def _manifest_text(manifest: dict[str, Any], images: Tensor, class_names: Sequence[str]) -> str:
    signature = {
        "input": {"name": INPUT_NAME, "layout": "NCHW", "range": [0, 1], "size": list(images.shape[1:])},
        "output": {"name": OUTPUT_NAME, "class_names": list(class_names)},
    }
    return json.dumps({**manifest, **signature}, sort_keys=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences exporters and converters, whose advice is for those who write them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(model: nn.Module, example: Tensor, opset: int) -> ir.Model:
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        if opset > MIN_OPSET:
            raise UsageError(f"the exporter cannot write this model at opset {opset}. Try {MIN_OPSET}.") from error
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UsageError(f"torch's ONNX exporter refuses the model with a dynamic batch: {reason}") from error
    assert program is not None  # None comes only from the old, TorchScript exporter
    written = program.model.opset_imports.get("")
    if written != opset:
        # The converter keeps the exporter's own set, in silence, when it does not know the wanted one.
        raise UsageError(f"opset {opset} was asked for but the exporter can only write {written}. Try {MIN_OPSET}.")
    return program.model


def _strip(model: ir.Model) -> None:
    """Removes stack traces, source paths and notes of the exporter, from nodes and from values."""
    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        graph.metadata_props.clear()
        named = [*graph.inputs, *graph.initializers.values()]
        for value in [*named, *(out for node in graph.all_nodes() for out in node.outputs)]:
            value.metadata_props.clear()
            value.doc_string = None


def _flush_subnormals(model: ir.Model) -> int:
    """Sets subnormal weights to zero; returns how many there were."""
    count = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype not in FLOATS:
                continue
            array = tensor.numpy()
            subnormal = (array != 0) & (np.abs(array) < np.finfo(array.dtype).tiny)
            if subnormal.any():
                count += int(subnormal.sum())
                value.const_value = ir.tensor(np.where(subnormal, array.dtype.type(0), array), name=value.name)
    return count


def _data_files(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Where the weights go when they do not fit into the file itself; empty when they do.

    The name holds the weights' hash, so that a new export never touches the data of the file it replaces.
    """
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= MAX_EMBEDDED_BYTES:
        return ()
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.tobytes())
    return (path.with_name(f"{path.name}.{content.hexdigest()[:12]}.data"),)


def _gate(part: Path, path: Path, model: nn.Module, images: Tensor) -> Parity:
    try:
        parity = check_parity(part, model, images)
    except UsageError as error:
        raise QualityGateError(f"the exported {path.name} does not work: {error}. It was not kept.") from error
    if not parity.passed:
        raise QualityGateError(
            f"the exported {path.name} is not the same function as the model: its logits are "
            f"{parity.onnx_error:.2e} from the float64 reference (torch float32: {parity.torch_error:.2e}), classes "
            f"agree on {100 * parity.argmax_agreement:.1f} % of images. It was not kept; try another torch version."
        )
    return parity
