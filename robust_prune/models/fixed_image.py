"""Logits of a model on one fixed image, by which a stored model is known again when it is opened.

The weights of a model do not say what its code does with them: the code of a user's file, of a Python object or of a
package may have changed since the model was stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from ..errors import RobustPruneError, UsageError
from ..introspect.fingerprint import buffers_hash
from ..introspect.modes import kept_modes
from ..printable import one_line
from . import user_file
from .spec import ModelSpec

SHARE = 1e-3
"""Largest difference of a logit relative to the range of all logits; single precision on another machine needs less."""
SHARE_OF_LOW_PRECISION = 5e-2
"""The same for models with weights in bf16 or fp16."""
_PACKAGES = ("torch", "timm", "torchvision")


@dataclass(frozen=True)
class Fingerprint:
    """What a model computed when it was stored.

    Attributes:
        logits: logits [K] on the fixed image, in eval mode on the CPU.
        packages: versions of the packages with whose code they were computed.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    logits: tuple[float, ...]
    packages: dict[str, str]


def fixed_image(size: Sequence[int]) -> Tensor:
    """Return the image [1, C, H, W], noise in multiples of 1/255 that is the same on all machines."""
    noise = hashlib.shake_256(b"robust-prune").digest(math.prod(size))
    return torch.frombuffer(bytearray(noise), dtype=torch.uint8).reshape(1, *size).float() / 255


def take(model: nn.Module, spec: ModelSpec) -> Fingerprint | None:
    """Return the fingerprint of a model on the CPU, whose modes are kept.

    None stands for a model that cannot be known again by it: it is random or changes its buffers in eval mode, fails,
    or returns something other than finite logits.
    """
    try:
        before = buffers_hash(model)
        with torch.random.fork_rng(devices=[]):  # around both, so that random models differ
            logits, again = _logits(model, spec), _logits(model, spec)
        steady = before == buffers_hash(model)
    except Exception:  # a model may raise any error
        return None
    if logits is None or again is None or not steady or _difference(logits, again) > _tolerance(logits, model):
        return None
    rounded = tuple(float(f"{value:.6g}") for value in logits.tolist())
    return Fingerprint(rounded, _versions(spec))


def check(found: Fingerprint, model: nn.Module, spec: ModelSpec, what: str) -> None:
    """Hold a model that has been opened against its fingerprint.

    Args:
        found: the stored fingerprint.
        model: the opened model, on the CPU; its modes are kept.
        spec: its specification.
        what: name of the file.

    Raises:
        UsageError: the model computes something else now, or cannot run.
    """
    stored = torch.tensor(found.logits, dtype=torch.float64)
    try:
        logits = _logits(model, spec)
    except RobustPruneError:
        raise
    except Exception as error:  # a model may raise any error
        said = one_line(error, 200)
        raise UsageError(f"{what} cannot run any more: {user_file.blame(error, spec.arch)}{said}") from error
    same_number = logits is not None and logits.shape == stored.shape
    apart = _difference(stored, logits) if same_number and logits is not None else math.inf
    if apart <= _tolerance(stored, model):
        return
    span = (stored.max() - stored.min()).item()
    share = f"by {100 * apart / span:.2g} % of their range" if math.isfinite(apart) and span > 0 else "in kind"
    now, packages = _versions(spec), found.packages
    changed = [f"{name} {packages[name]} (now {now.get(name)})" for name in packages if now.get(name) != packages[name]]
    raise UsageError(
        f"{what} computes something else than when it was saved: its logits on a fixed image differ {share}. "
        f"Restore {_remedy(spec, changed)}."
    )


def _remedy(spec: ModelSpec, changed: Sequence[str]) -> str:
    if changed:
        return f"the packages that it was saved with: {', '.join(changed)}"
    if user_file.is_reference(spec.arch):
        return f"{spec.arch}, and what it reads or imports, to what it was then"
    if spec.arch.startswith("object/"):
        return "the Python module to what it was then, and give that"
    return "the file from a copy: its weights were changed"


def _versions(spec: ModelSpec) -> dict[str, str]:
    own = user_file.is_reference(spec.arch) or spec.arch.startswith("object/")
    wanted = [name for name in _PACKAGES if own or name == "torch" or spec.arch.startswith(f"{name}/")]
    return {name: metadata.version(name) for name in wanted}


def _logits(model: nn.Module, spec: ModelSpec) -> Tensor | None:
    """The logits [K] in float64; None if the output is something else or not finite."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        output = model(fixed_image(spec.input_size))
        model.train()  # some transformers cache a bias table in eval mode, which only train mode clears
    if not isinstance(output, Tensor) or output.shape != (1, spec.num_classes) or not output.isfinite().all():
        return None
    return output[0].double()


def _difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _tolerance(logits: Tensor, model: nn.Module) -> float:
    low = any(value.dtype in (torch.float16, torch.bfloat16) for value in model.parameters())
    span = (logits.max() - logits.min()).item()
    return (SHARE_OF_LOW_PRECISION if low else SHARE) * span + 1e-5 * logits.abs().max().item() + 1e-6
