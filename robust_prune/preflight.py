"""Preflight: a model is tried on a few training images, in both modes, before any work begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.base import ImageSet, images_at_once, random_images
from .errors import UsageError
from .evaluation.flags import ALONE_IMAGES, BATCH_TOLERANCE, NO_GRADIENT, batch_drift, jitter
from .introspect.calls import THE_MODEL, guilty_of_difference, guilty_of_overflow, running
from .introspect.copies import copied
from .introspect.obstacles import check_layers, check_tensors
from .introspect.randomness import seeded
from .models.wrappers import unwrap
from .structure.paths import Pass, find_paths, owner_of, sample_images
from .structure.reference import first_line

IMAGES = 16
_NAMED = 5  # layers that a note names
_WRAP = (
    "Wrap the model so that forward returns the logits alone, and name a function that returns this wrapper with "
    "--arch file.py:function."
)


@dataclass(frozen=True)
class Preflight:
    """What a model that passed has to be told of: `notes`, whole sentences."""

    notes: tuple[str, ...]


def preflight(
    model: nn.Module, images: ImageSet, classes: int, seed: int, *, batch_size: int = IMAGES, cut: bool = True
) -> Preflight:
    """Try a model on up to 16 random training images: forward and backward, in eval mode and in train mode.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, `classes`]; it is not changed.
        images: training images.
        classes: number of classes, K.
        seed: random seed that draws the images.
        batch_size: number of images in a step of training; up to 16 are tried.
        cut: whether layers are to be cut, for which their weights must be plain parameters.

    Raises:
        UsageError: the model fails in one of the modes or on one image, does not return logits [N, K] in both, is
            random or judges an image by its batch in eval mode, has no gradient in the images or no parameter to
            train, cannot be copied, or has layers or tensors that cannot be worked with. The message names the module
            and the remedy.
    """
    base = unwrap(model)
    check_tensors(base)
    if cut:
        check_layers(base)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise UsageError(
            "all parameters of the model are frozen (requires_grad is False), so that it cannot be trained. Call "
            "model.requires_grad_(True)."
        )
    tried = copied(base).cpu()
    x, y = random_images(images, images_at_once(images, IMAGES), seed)
    with seeded(seed):
        _check_eval(tried, x, y, classes)
        _check_training(tried, x[:batch_size], y[:batch_size], classes)
        return Preflight(_notes(tried, sample_images(images, seed)))


def _check_eval(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> None:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        logits = _logits(model, Pass(x), "in eval mode", classes)
        _logits(model, Pass(x[:1]), "in eval mode on a single image", classes)
        model(x)
    awake = next((name for name, module in model.named_modules() if module.training), None)
    if awake is not None:
        raise UsageError(
            f"the model puts {awake or 'itself'} into train mode while it runs in eval mode. Leave the mode."
        )
    moved = next((n for n, b in model.named_buffers() if not _same(b, before.get(n))), None)
    if moved is not None:
        raise UsageError(
            f"buffer {moved} changes in eval mode, so that answers depend on what the model saw before. Change it only "
            "if self.training."
        )
    if not bool(torch.isfinite(logits).all()):
        count = int((~torch.isfinite(logits).all(dim=1)).sum())
        raise UsageError(
            f"the logits of {count} of {len(x)} training images are not finite; {guilty_of_overflow(model, x)} makes "
            "them so from finite values. Look for NaN in its weights, and check the normalization."
        )
    _check_repeatable(model, x)
    _check_gradient(model, x, y, logits)


def _check_repeatable(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        logits = model(x).float()
        by_chance, by_batch = jitter(model, x, logits), batch_drift(model, x, logits)
    if by_chance > BATCH_TOLERANCE:
        raise UsageError(
            f"two passes over the same images in eval mode differ by {100 * by_chance:.1f} % of the logits' spread "
            f"(limit 1 %): {guilty_of_difference(model, x, x)} is random. Let it be so only if self.training, as in "
            "F.dropout(x, p, self.training)."
        )
    if by_batch > BATCH_TOLERANCE:
        shifted = (x[:ALONE_IMAGES].roll(-i, 0) for i in range(min(ALONE_IMAGES, len(x))))
        named = (guilty_of_difference(model, images, images[:1]) for images in shifted)
        guilty = next((name for name in named if name != THE_MODEL), THE_MODEL)
        raise UsageError(
            f"in eval mode an image's logits depend on the batch it is in: they move by {100 * by_batch:.1f} % of "
            f"their spread (limit 1 %), first in {guilty}. Let it treat each image alone in eval mode; a batch norm "
            "needs running statistics (track_running_stats=True)."
        )


def _check_gradient(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> None:
    images = x.clone().requires_grad_()

    def gradient() -> Tensor | None:
        loss = F.cross_entropy(model(images).float(), y, reduction="sum")
        return torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None

    found = _guarded(model, gradient, "backward in eval mode")
    if found is None:
        raise UsageError(NO_GRADIENT)
    if not bool(found.any()) and float(logits.std(dim=0).max()) > 0:
        raise UsageError(
            "the gradient of the loss in the images is zero everywhere, so that no gradient attack can run. Take "
            "rounding, thresholds and detach out of the model's forward."
        )


def _check_training(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> None:
    where = "in train mode" + (" on one image" if len(x) == 1 else "")
    logits = _logits(model, Pass(x, training=True), where, classes)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward() -> bool:
        loss = F.cross_entropy(model(x).float(), y)
        return loss.requires_grad and any(g is not None for g in torch.autograd.grad(loss, trained, allow_unused=True))

    if not _guarded(model, backward, "backward in train mode"):
        raise UsageError(
            "in train mode the loss has no gradient in any parameter that may be trained. Look for no_grad and detach "
            "in the model's forward."
        )
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(
            f"the logits of training images are not finite in train mode; {guilty_of_overflow(model, x)} makes them so "
            "from finite values."
        )


def _logits(model: nn.Module, step: Pass, where: str, classes: int) -> Tensor:
    """Return the logits of a pass, which must be one tensor [N, classes]."""
    found: Any = _guarded(model, lambda: step.run(model), where)
    if isinstance(found, Tensor) and found.shape == (len(step.images), classes) and found.is_floating_point():
        return found
    raise UsageError(
        f"{where} the model returns {_described(found)}, and must return one tensor of logits "
        f"[{len(step.images)}, {classes}] in both modes. {_WRAP}"
    )


def _guarded(model: nn.Module, run: Callable[[], Any], where: str) -> Any:
    with running(model) as innermost:
        try:
            return run()
        except Exception as error:  # the model's code may raise anything
            place = "" if innermost() == THE_MODEL else f", at {innermost()}"
            raise UsageError(
                f"the model fails {where}{place}: {type(error).__name__}: {first_line(error).rstrip(chr(46))}. "
                f"{_remedy(error, where)}"
            ) from error


def _remedy(error: Exception, where: str) -> str:
    if isinstance(error, TypeError) and "positional argument" in str(error):
        return "forward must take the images alone; wrap the model so that it does."
    if "use_reentrant" in str(error):
        return "Pass use_reentrant=False to torch.utils.checkpoint."
    if "one image" in where:
        return "The batch size of training leaves one image for each step, and batch norm needs more. Raise batch_size."
    if "train" in where:
        return (
            "Fine-tuning runs it in train mode: mend this, or give the model without the part that only training runs."
        )
    if "single" in where:
        return "Any number of images must do, also one."
    return "It must take [N, C, H, W] images of the data's size, any number N, and be differentiable."


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} values"
    return f"a {type(value).__name__}"


def _same(now: Tensor, before: Tensor | None) -> bool:
    return before is not None and now.shape == before.shape and bool(torch.equal(now.nan_to_num(), before.nan_to_num()))


def _notes(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Return sentences on layers that are not always run."""
    paths = find_paths(model.eval(), images, ())
    notes = []
    for reason, said in (
        ("only training runs it", "Only training runs"),
        ("only some images take it", "Only some images take"),
    ):
        if names := _topmost(model, {name for name, why in paths.reasons.items() if why == reason}):
            notes.append(f"{said} {_listed(names)}; it is cut only where layers that always run require it.")
    if paths.unused:
        notes.append(f"No image runs {_listed(_topmost(model, set(paths.unused)))}; it stays as it is.")
    return tuple(notes)


def _topmost(model: nn.Module, names: set[str]) -> list[str]:
    """Replace names of layers, parameters and buffers by that of a module all of whose parts are among them."""
    owners = {owner_of(model, name) for name, _ in chain(model.named_parameters(), model.named_buffers())}

    def climbed(name: str) -> str:
        above = name.rpartition(".")[0]
        return climbed(above) if above and {n for n in owners if n.startswith(f"{above}.")} <= names else name

    return list(dict.fromkeys(map(climbed, sorted(names))))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more layers" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
