"""Reading of weight files without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..archives import check_archive
from ..errors import UsageError
from ..printable import one_line
from ..suggest import did_you_mean

_OTHERS = {
    ".onnx": "an ONNX file",
    ".npz": "a file of arrays",
    ".engine": "a TensorRT engine",
    ".tflite": "a TFLite file",
}
_SAFETENSORS_HEADER_LIMIT = 16_000_000
"""Bytes of the header; the largest models of timm have a hundred thousand."""
_DEEPEST = 50
_FREE_BYTES = 1 << 20
"""Bytes that a tensor may show beyond those of its storage; expanded tensors occur as constants of modules."""
_PICKLED = (
    "holds pickled Python objects, and opening it would run code from the file. Save a plain state_dict "
    "(torch.save(model.state_dict(), …)), or pass --trust-pickle if you trust where it comes from."
)


class _Settings(dict[str, Any]):
    """Stands for the containers of settings that training frameworks store beside the weights."""


# Numpy 1 and 2 have it in different modules.
_numpy_scalar = np.float64(0).__reduce__()[0]
# Containers of plain values, which training scripts store beside the weights; none of them can run code.
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    defaultdict,
    int,
    float,
    list,
    dict,
    (_Settings, "lightning.fabric.utilities.data.AttributeDict"),
    (_Settings, "lightning_fabric.utilities.data.AttributeDict"),
    (_Settings, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (np.dtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
)


@dataclass(frozen=True)
class Contents:
    """Contents of a weight file.

    Attributes:
        value: ``{name: tensor}`` of a safetensors file, or the object saved by ``torch.save``.
        metadata: metadata of a safetensors file.
    """

    value: Any
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: Path, *, trust_pickle: bool = False) -> Contents:
    """Read a ``.safetensors`` or ``torch.save`` file to the CPU; its kind is determined by its bytes, not by its name.

    Args:
        path: the file.
        trust_pickle: whether to allow pickled objects, which may run any code.

    Raises:
        UsageError: the path does not exist or is a folder; or the file is empty, damaged, not a weight file, or
            contains pickled objects without `trust_pickle`.
    """
    head = _head(path)
    if path.suffix.lower() in _OTHERS:
        raise UsageError(f"{path} is {_OTHERS[path.suffix.lower()]}. Give the PyTorch weights that it was made from.")
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of Git LFS, not the file itself. Run git lfs pull in its folder.")
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith(b"PK") or head.startswith(b"\x80"):
        check_archive(path)
        value = _read_torch(path, trust_pickle)
        check_values(value, path)
        return Contents(value)
    kind = "a text file" if _is_text(head) else "of an unknown kind"
    raise UsageError(f"{path} is {kind}, not a weight file. Give a .safetensors or a file written by torch.save.")


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise UsageError(f"{path} is a folder. Give the model file inside it, e.g. {path / 'model.safetensors'}.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        folder = "" if path.parent.is_dir() else f" (its folder {path.parent} does not exist either)"
        raise UsageError(f"model file {path} does not exist{folder}.{did_you_mean(path.name, siblings)}")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise UsageError(f"{path} is empty (0 bytes). Copy or save the model again.")
    return head


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _SAFETENSORS_HEADER_LIMIT


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return Contents({key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is a damaged or incomplete safetensors file: {one_line(error, 160)}") from error


def _read_torch(path: Path, trust_pickle: bool) -> Any:
    try:
        with torch.serialization.safe_globals([*_HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
            if culprit or "weights_only" in str(error).lower() or "weights only" in str(error).lower():
                named = f" ({culprit[1]})" if culprit else ""
                raise UsageError(f"{path} {_PICKLED.replace('objects', 'objects' + named, 1)}") from error
            raise UsageError(f"{path} is not a file written by torch.save: {one_line(error, 160)}") from error
    except Exception as error:  # a truncated archive raises RuntimeError, EOFError, KeyError or OSError
        if "TorchScript" in str(error):
            raise UsageError(f"{path} is a TorchScript archive. Give a state_dict and --arch instead.") from error
        raise UsageError(f"{path} is damaged, incomplete or not from torch.save: {one_line(error, 160)}") from error
    return _read_pickle(path, lambda: torch.load(path, map_location="cpu", weights_only=False))


def check_values(value: Any, path: Path) -> None:
    """Refuse containers that hold themselves, and tensors that show more values than the file holds."""
    waiting: list[tuple[Any, tuple[int, ...]]] = [(value, ())]
    seen: set[int] = set()
    while waiting:
        item, above = waiting.pop()
        if id(item) in above or len(above) > _DEEPEST:
            raise UsageError(f"{path} is damaged: a container in it holds itself, or lies too deep.")
        if isinstance(item, torch.Tensor) and (problem := _unusable(item)):
            raise UsageError(f"{path} is damaged: a tensor in it {problem}.")
        if isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            parts = item.values() if isinstance(item, dict) else item
            waiting += [(part, (*above, id(item))) for part in parts]


def _unusable(tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return ""  # what kinds weights can be is said by name, later
    stored = tensor.untyped_storage().nbytes()
    wanted = tensor.numel() * tensor.element_size()
    return f"shows {wanted:,} bytes and holds {stored:,}" if wanted > max(stored, _FREE_BYTES) else ""


def _read_pickle(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # unpickling runs foreign code
        raise UsageError(
            f"cannot unpickle {path}: {one_line(error, 160)}. Run from the folder that holds the model's Python files."
        ) from error
