"""Export to one ONNX file that ONNX Runtime runs at any batch size, with a parity check."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from ..console import others_silent
from ..data.base import ImageSet, stratified_images
from ..errors import QualityGateError, UsageError
from ..models.spec import ModelSpec
from ..recipe import ExportSection
from ..runs.files import atomic_write, file_sha256
from ..serialization import to_json
from . import refusal
from .parity import check_images, check_parity, eval_copy, logits_of
from .types import MANIFEST_KEY, OnnxArtifact, Parity

MIN_OPSET = 18
PARITY_IMAGES = 16
INPUT_NAME, OUTPUT_NAME = "images", "logits"
# Protobuf limits messages to 2 GiB, and the graph itself needs some space.
MAX_EMBEDDED_BYTES = 1_800_000_000
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def export_model(
    model: nn.Module, spec: ModelSpec, images: ImageSet, path: str | Path, section: ExportSection, seed: int
) -> OnnxArtifact:
    """Run `export_onnx` with a manifest that describes the model, checked on 16 training images.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K].
        spec: specification of the model, stored in the manifest.
        images: training images, at least 9.
        path: the file to write.
        section: export section of the recipe, with the opset.
        seed: random seed of the run, stored in the manifest.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `export_onnx`.
    """
    few, _ = stratified_images(images, PARITY_IMAGES)
    manifest = {"model": to_json(spec), "seed": seed}
    return export_onnx(model, path, few, manifest=manifest, opset=section.opset, class_names=spec.class_names)


def check_export(model: nn.Module, spec: ModelSpec, images: ImageSet, section: ExportSection, seed: int) -> None:
    """Run `export_model` without keeping the file.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `export_onnx`.
    """
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, spec, images, Path(folder) / "model.onnx", section, seed)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    manifest: dict[str, Any],
    opset: int = MIN_OPSET,
    class_names: Sequence[str] = (),
) -> OnnxArtifact:
    """Export `model` to `path` with a dynamic batch size, after a parity check against a float64 reference.

    The model is copied to the CPU in float32, contiguous and in eval mode; the original is not changed. The file's
    input is ``images`` (float32 [batch, C, H, W] in [0, 1]), its output ``logits`` ([batch, K]). Weights that are
    subnormal after batch-norm folding are set to zero, since they change no logit and slow down some CPUs. If the
    weights exceed 1.8 GB, they are written to a ``.data`` file next to `path`.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; normalization is inside.
        path: the file to write; an existing file is replaced only if the parity check passes.
        images: real training images for the parity check and the input size, float [N, C, H, W] in [0, 1], N >= 9.
        manifest: JSON values that are stored in the file's metadata under ``robust_prune``.
        opset: ONNX operator set, >= 18.
        class_names: names of the classes, stored in the manifest; may be empty.

    Returns:
        The artifact, with the result of the parity check.

    Raises:
        UsageError: the opset cannot be written, the images are unsuitable, the number of class names is wrong, or the
            exporter does not support the model.
        QualityGateError: the outputs of the file differ from those of the model; nothing is written to `path`.
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
    """Return the manifest that `export_onnx` stored in a file; empty if the file has none.

    Raises:
        UsageError: the file is missing or is not an ONNX file.
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
    """Suppress logs, warnings and output of exporters and converters, which are meant for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # torch.export prints the graph of a model that it refuses to the standard error.
        with warnings.catch_warnings(), others_silent(), contextlib.redirect_stderr(io.StringIO()):
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
        with quiet():
            reason = refusal.reason(model, example, error)
        raise UsageError(f"torch's ONNX exporter refuses the model with a dynamic batch: {reason}") from error
    assert program is not None  # None comes only from the old, TorchScript exporter
    written = program.model.opset_imports.get("")
    if written != opset:
        # The converter keeps the exporter's own opset without a warning if it does not support the requested one.
        raise UsageError(f"opset {opset} was asked for but the exporter can only write {written}. Try {MIN_OPSET}.")
    return program.model


def _strip(model: ir.Model) -> None:
    """Remove stack traces, source paths and comments of the exporter from nodes and values."""
    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        graph.metadata_props.clear()
        named = [*graph.inputs, *graph.initializers.values()]
        for value in [*named, *(out for node in graph.all_nodes() for out in node.outputs)]:
            value.metadata_props.clear()
            value.doc_string = None


def _flush_subnormals(model: ir.Model) -> int:
    """Set subnormal weights to zero and return their number."""
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
    """Return the path of the external data file, or nothing if the weights fit into the ONNX file.

    The name contains the hash of the weights, so that a new export never changes the data of the file that it replaces.
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
