"""Parity check: whether an exported file computes the same function as the model, up to rounding.

Comparing ONNX with torch in float32 is not conclusive, since both round: a deep network in float32 may differ by 1e-3
from the exact result, and a wrong weight may change it by less. Therefore both are compared with the model in float64,
and the error of the file may be at most `ERROR_FACTOR` times that of torch in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.base import ImageSet
from ..errors import QualityGateError, UsageError
from ..introspect.copies import copied
from .types import Parity

BATCH_SIZES = (1, 3, 8)
MIN_IMAGES = 9
ERROR_FACTOR = 4.0
# On a very small network the error of torch can be zero by chance, so the limit has a lower bound.
FLOOR_ULPS = 16.0
REFERENCE_BATCH = 64


def check_enough_images(images: ImageSet, name: str) -> None:
    """Check that there are enough images for the parity check of an export, before a run begins.

    Args:
        images: training images on which the export will be checked.
        name: name of the data set, for the message.

    Raises:
        UsageError: there are fewer than 9 images.
    """
    if len(images) < MIN_IMAGES:
        raise UsageError(
            f"{name} leaves {len(images)} training images beside the held-out ones; the exported file is "
            f"checked on at least {MIN_IMAGES}. Give more images."
        )


def check_parity(path: Path, model: nn.Module, images: Tensor) -> Parity:
    """Compare an ONNX file with its torch model on the CPU.

    The check passes if ``err(onnx, fp64) <= 4 * err(torch fp32, fp64)`` (the limit is at least 16 units in the last
    place of the largest logit) and the predicted classes agree. Classes agree if their logits in the reference differ
    by at most twice the limit, since rounding alone may swap them.

    Args:
        path: the ONNX file.
        model: the torch model; it is copied and not changed.
        images: real images, since most units are inactive on noise; float [N, C, H, W] in [0, 1], N >= 9.

    Returns:
        The largest errors of logits, and whether the check passes. A failed check raises nothing.

    Raises:
        UsageError: the images are unsuitable, the model does not run on them, or ONNX Runtime cannot open the file.
        QualityGateError: the torch model gives NaN or infinite logits, so that there is no reference.
    """
    check_images(images)
    images = images.detach().to("cpu", torch.float32).contiguous()
    reference = eval_copy(model, torch.float64)
    with _Widened():
        exact = logits_of(reference, images.double())
    rounded = logits_of(eval_copy(model, torch.float32), images).double()
    if not (exact.isfinite().all() and rounded.isfinite().all()):
        raise QualityGateError("the torch model gives NaN or infinite logits on these images: nothing to export")
    torch_error = float((rounded - exact).abs().max())
    allowed = max(ERROR_FACTOR * torch_error, FLOOR_ULPS * torch.finfo(torch.float32).eps * float(exact.abs().max()))
    onnx_error, agreement = _compare(path, images.numpy(), exact.numpy(), allowed)
    return Parity(
        batch_sizes=BATCH_SIZES,
        images=len(images),
        onnx_error=onnx_error,
        torch_error=torch_error,
        argmax_agreement=agreement,
        passed=onnx_error <= allowed and agreement == 1.0,
    )


def check_images(images: Tensor) -> None:
    """Check that `images` are float [N, C, H, W] in [0, 1] with N >= 9.

    Raises:
        UsageError: they are not.
    """
    if images.ndim != 4 or not images.is_floating_point() or len(images) < MIN_IMAGES:
        raise UsageError(
            f"export needs float images [N, C, H, W] with N >= {MIN_IMAGES}, got {images.dtype} {list(images.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(f"export needs images in [0, 1], got {low:.3g} to {high:.3g}. Divide uint8 by 255.")


def eval_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of `model` in eval mode, on the CPU, contiguous, in `dtype` and with frozen parameters."""
    return copied(model).eval().to("cpu", dtype).to(memory_format=torch.contiguous_format).requires_grad_(False)


class _Widened(TorchFunctionMode):
    """Replaces float32 by float64 wherever a forward pass requests it.

    Attention and positional embeddings often request float32 by name (``x.float()``, ``dtype=torch.float32``) or by
    default (``torch.linspace``), which would round the reference or mix types.
    """

    def __enter__(self) -> TorchFunctionMode:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits [N, K] of a model in eval mode on images [N, C, H, W].

    Raises:
        UsageError: the model does not run on these images, or does not return one tensor [N, K].
    """
    with torch.inference_mode():
        parts = [_forward(model, part) for part in images.split(REFERENCE_BATCH)]
    return torch.cat(parts)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    try:
        out = model(images)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        shape = list(images.shape)
        raise UsageError(f"the model does not run on {images.dtype} images {shape} on the CPU: {reason}") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        found = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"the model must return logits [N, classes] for N = {len(images)} images, got {found}")
    return out


def _compare(path: Path, images: np.ndarray, exact: np.ndarray, allowed: float) -> tuple[float, float]:
    """Return the largest error of the file over all batch sizes, and the share of predictions that agree."""
    session = _open(path)
    name = session.get_inputs()[0].name
    worst, agree, seen = 0.0, 0, 0
    for part in _batches(len(images)):
        got = _run(session, name, images[part])
        want = exact[part]
        if got is None or got.shape != want.shape or not np.isfinite(got).all():
            # The file fails at this batch size or does not return finite logits.
            worst, seen = float("inf"), seen + len(want)
            continue
        worst = max(worst, float(np.abs(got - want).max()))
        chosen = want[np.arange(len(want)), got.argmax(axis=1)]
        agree += int((chosen >= want.max(axis=1) - 2 * allowed).sum())
        seen += len(want)
    return worst, agree / seen


def _batches(total: int) -> Iterator[slice]:
    """Yield every image once in batches of the largest size, and a few images in each smaller size."""
    *small, large = BATCH_SIZES
    for size in small:
        for start in (0, total - size):
            yield slice(start, start + size)
    for start in range(0, total, large):
        yield slice(start, start + large)


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"ONNX Runtime cannot open {path.name}: {reason}") from error


def _run(session: Any, name: str, images: np.ndarray) -> np.ndarray | None:
    try:
        return np.asarray(session.run(None, {name: images})[0], dtype=np.float64)
    except Exception:
        return None
