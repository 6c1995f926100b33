"""The gate between an exported file and the model it came from: is it the same function, up to rounding?

Comparing ONNX with torch in float32 says little, because both round: a deep network in float32 may be 1e-3
away from the exact answer, and a wrong weight may be closer than that. So both are compared with the model
run in float64, and the file may be at most `ERROR_FACTOR` times as far from it as torch's own float32 is.
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
# Torch's own error can be zero by luck on a very small network, where a factor of it would allow nothing.
FLOOR_ULPS = 16.0
REFERENCE_BATCH = 64


def check_enough_images(images: ImageSet, name: str) -> None:
    """Says before hours of work that an export could not be checked at its end.

    Args:
        images: the training images that an export would be checked on.
        name: of their data set, for the message.

    Raises:
        UsageError: too few of them.
    """
    if len(images) < MIN_IMAGES:
        raise UsageError(
            f"{name} leaves {len(images)} training images beside the held-out ones; the exported file is "
            f"checked on at least {MIN_IMAGES}. Give more images."
        )


def check_parity(path: Path, model: nn.Module, images: Tensor) -> Parity:
    """Compares an ONNX file with the torch model it came from, on the CPU.

    The gate holds when ``err(onnx, fp64) <= 4 * err(torch fp32, fp64)`` (at least 16 units in the last place
    of the largest logit) and the predicted classes agree. A class that trails the reference's best by no
    more than twice the allowed error counts as agreement: rounding alone may swap such a tie.

    Args:
        path: the ONNX file.
        model: the torch model; it is copied, and neither its mode nor its device changes.
        images: float [N, C, H, W] in [0, 1], N >= 9: real images, because noise leaves most units dead.

    Returns:
        The measured errors, in logits, and whether the gate holds. Nothing is raised for a gate that fails.

    Raises:
        UsageError: unsuitable images, or a file that ONNX Runtime cannot open.
        QualityGateError: the torch model itself gives no finite logits, so that there is no reference.
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
    """Refuses images that are not float [N >= 9, C, H, W] in [0, 1].

    Raises:
        UsageError: says what was found.
    """
    if images.ndim != 4 or not images.is_floating_point() or len(images) < MIN_IMAGES:
        raise UsageError(
            f"export needs float images [N, C, H, W] with N >= {MIN_IMAGES}, got {images.dtype} {list(images.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(f"export needs images in [0, 1], got {low:.3g} to {high:.3g}. Divide uint8 by 255.")


def eval_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in eval mode, on the CPU, contiguous, in `dtype`, without gradients."""
    return copied(model).eval().to("cpu", dtype).to(memory_format=torch.contiguous_format).requires_grad_(False)


class _Widened(TorchFunctionMode):
    """Turns a forward pass's own requests for float32 into float64.

    Attention and positional code often asks for float32 by name (``x.float()``, ``dtype=torch.float32``) or
    by default (``torch.linspace``), which would round the reference or mix types.
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
    """Logits ([N, classes]) of a model in eval mode.

    Raises:
        UsageError: the model does not run on these images, or gives no single [N, classes] tensor.
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
    """Largest error of the file over all batch sizes, and the share of images on which its class agrees."""
    session = _open(path)
    name = session.get_inputs()[0].name
    worst, agree, seen = 0.0, 0, 0
    for part in _batches(len(images)):
        got = _run(session, name, images[part])
        want = exact[part]
        if got is None or got.shape != want.shape or not np.isfinite(got).all():
            # Refuses this batch size, or answers with something that is no logit.
            worst, seen = float("inf"), seen + len(want)
            continue
        worst = max(worst, float(np.abs(got - want).max()))
        chosen = want[np.arange(len(want)), got.argmax(axis=1)]
        agree += int((chosen >= want.max(axis=1) - 2 * allowed).sum())
        seen += len(want)
    return worst, agree / seen


def _batches(total: int) -> Iterator[slice]:
    """Every image once in batches of the largest size, and a few in each of the smaller ones."""
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
