"""Warnings about robust accuracies that may not be trusted; each is a rule with a threshold, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, pgd
from ..attacks.objectives import margin
from ..errors import UsageError
from ..introspect.fingerprint import buffers_hash
from ..models.normalization import Normalization, NormalizedClassifier, published_normalizations
from .gradient_test import gradient_flags
from .scoring import WorstPoint

CHECK_IMAGES = 64
ALONE_IMAGES = 8
BATCH_TOLERANCE = 0.01
FEWEST_DISTINCT, SAME_SHARE, NO_CHANGE = 16, 0.01, 1e-6
LEAST_MARGIN, USUAL_MARGIN, LARGEST_MARGIN = 0.01, 5.0, 100.0
EXPORTED_CLEAN_SHARE = 0.005
EXPORTED_ROBUST_POINTS = 1.0
RANGE_GAIN, RANGE_NOISE = 0.1, 3.0
LARGE_RADIUS, LARGE_STEPS, LARGE_IMAGES, LARGE_SHARE = 0.5, 10, 32, 0.1
FEWEST_PAIRS, BISECTIONS, JUMP_SHARE = 8, 12, 0.25
BLACK_BOX_BROKEN = 1
PGD_GAP_POINTS, PGD_GAP_IMAGES = 8.0, 300
MONOTONE_POINTS = 1.0
NO_GRADIENT = (
    "the model's outputs have no gradient with respect to the images, so a gradient attack cannot judge it. "
    "Take no_grad, detach and rounding out of its forward."
)
BUFFERS_MOVED = "Buffers of the model moved while it was evaluated: its answers depend on what it saw before."

NOT_COPIED = "The model cannot be copied, so it was not checked whether it remembers what it was asked."

LEARNED = (
    "After the attacks the model answers differently from a copy made before (by {drift:.1f} % of the logits' spread, "
    "limit 1 %): it remembers what it was asked."
)


def mode_flags(model: nn.Module) -> list[str]:
    """Return a warning if modules were in train mode when the evaluation began."""
    modules = list(model.modules())
    training = sum(m.training for m in modules)
    if not training:
        return []
    return [f"The model was not in eval mode when it came in ({training} of {len(modules)} modules); it was put in it."]


def behaviour_flags(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return the warnings of all rules that are checked on a few images.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; in eval mode with frozen parameters.
        x, y: images [N, C, H, W] in [0, 1] and labels [N]; the first 64 are used.

    Raises:
        UsageError: the outputs have no gradient with respect to the images.
    """
    x, y = x[:CHECK_IMAGES], y[:CHECK_IMAGES]
    if no_gradient(model, x):
        raise UsageError(NO_GRADIENT)
    before = buffers_hash(model)
    with torch.no_grad():
        logits = model(x).float()
    flags = non_finite_flag(logits) + probability_flag(logits) + label_flag(logits) + scale_flag(logits)
    if any(module.training for module in model.modules()):
        flags.append("The model puts itself back into training mode while it runs.")
    flags += composition_flags(model, x, logits)
    if buffers_hash(model) != before:
        flags.append(BUFFERS_MOVED)
    flags += attended_flag(model, x, logits)
    flags += input_range_flags(model, x, y) + boundary_flags(model, x, logits)
    return flags + gradient_flags(model, x, y) + large_radius_flags(model, x, y)


def non_finite_flag(logits: Tensor) -> list[str]:
    """Return a warning if logits [N, K] are not finite."""
    share = 1 - torch.isfinite(logits).all(dim=1).float().mean().item()
    return [f"{100 * share:.1f} % of images gave logits that are not finite; they count as wrong."] if share else []


def probability_flag(logits: Tensor) -> list[str]:
    """Return a warning if outputs [N, K] are all in [0, 1], such as probabilities, whose gradients saturate."""
    if bool(((logits >= 0) & (logits <= 1)).all()):
        return ["All outputs are in [0, 1], like probabilities or sigmoids: the attacks need logits."]
    return []


def label_flag(logits: Tensor) -> list[str]:
    """Return a warning if the outputs [N, K] of all images are nearly the same but for their order."""
    ordered = logits[torch.isfinite(logits).all(dim=1)].sort(dim=1).values
    if len(ordered) < FEWEST_DISTINCT or ordered.shape[1] < 2:
        return []
    # Not the range of all logits: classes that are ruled out by a large negative logit would make any spread small.
    spread, scale = ordered.std(dim=0).max().item(), (ordered[:, -1] - ordered[:, -2]).median().item()
    if logits.std(dim=0).max().item() <= NO_CHANGE * max(logits.abs().max().item(), 1.0):
        return ["The outputs do not depend on the image."]
    if spread < SAME_SHARE * scale:
        return [
            f"The sorted outputs of {len(ordered)} images are the same to {100 * SAME_SHARE:.0f} %: the model returns "
            "little more than a label, and attacks see little of what it computes."
        ]
    return []


def usual_scale(logits: Tensor) -> float:
    """Return the factor that brings the median margin between the two largest logits [N, K] to 5, or 1 if it is usual.

    The cross-entropy of much larger logits is zero, that of much smaller ones is the same for all images; either has
    hardly a gradient.
    """
    if logits.shape[1] < 2:
        return 1.0
    first, second = logits.topk(2, dim=1).values.unbind(1)
    apart = (first - second)[torch.isfinite(first - second)]
    median = apart.median().item() if len(apart) else 0.0
    return 1.0 if median == 0 or LEAST_MARGIN <= median <= LARGEST_MARGIN else USUAL_MARGIN / median


def scale_flag(logits: Tensor) -> list[str]:
    """Return a warning if logits [N, K] are attacked on another scale; see `usual_scale`."""
    factor = usual_scale(logits)
    if factor == 1:
        return []
    return [
        f"The two largest logits are {USUAL_MARGIN / factor:.2g} apart (median; usual are {LEAST_MARGIN:g} to "
        f"{LARGEST_MARGIN:g}), a scale that hides the cross-entropy's gradient: attacks saw the logits times "
        f"{factor:.2g}."
    ]


def attended_flag(model: nn.Module, x: Tensor, logits: Tensor) -> list[str]:
    """Return a warning if logits [N, K] differ for images that require gradients, as those of an attack do."""
    with torch.enable_grad():
        found = model(x.detach().clone().requires_grad_(True)).detach()
    drift = _change(found, logits, logits)
    if drift > BATCH_TOLERANCE:
        return [
            f"Logits move by {100 * drift:.1f} % of their spread (limit 1 %) where images require gradients: the model "
            "answers an attack differently."
        ]
    return []


def learned_flags(model: nn.Module, untouched: nn.Module, x: Tensor) -> list[str]:
    """Return a warning if the model answers differently from a copy that was made before the attacks.

    Args:
        model: the model after the attacks.
        untouched: the copy.
        x: attacked images [N, C, H, W].
    """
    with torch.no_grad():
        logits = untouched(x).float()
        drift = _change(model(x), logits, logits)
    return [LEARNED.format(drift=100 * drift)] if drift > BATCH_TOLERANCE else []


@torch.no_grad()
def input_range_flags(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return a warning if accuracy rises by more than 10 points, and beyond noise, with another normalization.

    The normalizations of published models are put before the model, and taken back where the model may normalize
    images that it should not. Gains must exceed three standard deviations of what as many images vary by chance.
    """
    right = model(x).argmax(dim=1) == y
    for name, images in _other_ranges(model, x).items():
        better = model(images).argmax(dim=1) == y
        lead = int((better & ~right).sum()) - int((right & ~better).sum())
        noise = int((better ^ right).sum()) ** 0.5
        if lead > max(RANGE_GAIN * len(x), RANGE_NOISE * noise):
            return [
                f"The model is {100 * lead / len(x):.0f} points better (limit 10, {len(x)} images) on images {name} "
                "than on those that it was given: its normalization is wrong. Set it with --normalization."
            ]
    return []


def _other_ranges(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    none, *others = published_normalizations(x.shape[1])
    if isinstance(model, NormalizedClassifier):
        own = Normalization("own", *(tuple(buffer.flatten().tolist()) for buffer in (model.mean, model.std)))
        return {_phrase(other): own.undo(other(x)) for other in (none, *others)}
    undone = {f"that take back the normalization {o}": o.undo(x) for o in others if o.name != "0-255"}
    return {_phrase(other): other(x) for other in others} | undone


def _phrase(normalization: Normalization) -> str:
    named = {"none": "in [0, 1] without normalization", "0-255": "in [0, 255]"}
    return named.get(normalization.name, f"normalized by {normalization}")


@torch.no_grad()
def composition_flags(model: nn.Module, x: Tensor, logits: Tensor) -> list[str]:
    """Return a warning if logits change between passes or batches by more than 1 % of their standard deviation."""
    by_chance = jitter(model, x, logits)
    if by_chance > BATCH_TOLERANCE:
        return [f"Two passes over the same images differ by {100 * by_chance:.1f} % of the logits' spread (limit 1 %)."]
    drift = batch_drift(model, x, logits)
    if drift > BATCH_TOLERANCE:
        return [
            "An image's logits depend on the batch it is in: "
            f"they move by {100 * drift:.1f} % of their spread (limit 1 %)."
        ]
    return []


@torch.no_grad()
def jitter(model: nn.Module, x: Tensor, logits: Tensor) -> float:
    """Return the largest change of `logits` [N, K] in a second pass over `x`, relative to their standard deviation."""
    return _change(model(x), logits, logits)


@torch.no_grad()
def batch_drift(model: nn.Module, x: Tensor, logits: Tensor) -> float:
    """Return the largest change of the `logits` [N, K] of up to 8 images that are run alone, as `jitter`."""
    count = min(ALONE_IMAGES, len(x))
    return _change(torch.cat([model(x[i : i + 1]) for i in range(count)]), logits[:count], logits)


def _change(found: Tensor, before: Tensor, logits: Tensor) -> float:
    # Over the images, class by class: a class that is ruled out by a large negative logit says nothing of the others.
    spread = logits.std(dim=0).max().item() if len(logits) > 1 else logits.std().item()
    if not torch.isfinite(logits).all() or spread == 0:
        return 0.0
    return (found.float() - before).abs().max().item() / spread


@torch.no_grad()
def boundary_flags(model: nn.Module, x: Tensor, logits: Tensor) -> list[str]:
    """Return a warning if the two largest logits stay apart where the predicted class changes.

    Between two images of different predicted classes, bisection finds where the prediction changes. There the two
    largest logits of a continuous model are nearly the same; those of a model that adds something to the predicted
    class jump, and gradients do not show the way across.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        x: images [N, C, H, W].
        logits: their logits [N, K].
    """
    classes = logits.argmax(dim=1)
    order = torch.arange(len(x)).roll(1)
    pairs = (classes != classes[order]).nonzero().flatten()[:LARGE_IMAGES]
    apart = logits.topk(min(2, logits.shape[1]), dim=1).values
    usual = (apart[:, 0] - apart[:, -1]).median().item()
    if len(pairs) < FEWEST_PAIRS or usual <= 0:
        return []
    begin, end, first = x[pairs], x[order[pairs]], classes[pairs]
    low, high = torch.zeros(len(pairs)).to(x), torch.ones(len(pairs)).to(x)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        same = model(torch.lerp(begin, end, middle[:, None, None, None])).argmax(dim=1) == first
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    near = model(torch.lerp(begin, end, low[:, None, None, None])).float().topk(2, dim=1).values
    gap = (near[:, 0] - near[:, 1]).median().item()
    if gap > JUMP_SHARE * usual:
        return [
            f"Where the predicted class changes, the two largest logits are still {gap:.2g} apart (median; {usual:.2g} "
            f"at the images, limit {100 * JUMP_SHARE:.0f} % of it): the outputs jump, which gradients do not show."
        ]
    return []


def no_gradient(model: nn.Module, x: Tensor) -> bool:
    """Return whether the outputs have no gradient with respect to the images [N, C, H, W]."""
    images = x[:1].detach().clone().requires_grad_(True)
    with torch.enable_grad():
        total = model(images).float().sum()
        return not total.requires_grad or torch.autograd.grad(total, images, allow_unused=True)[0] is None


def large_radius_flags(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return a warning if more than 10 % of images survive PGD at Linf 0.5, where every image can become grey."""
    x, y = x[:LARGE_IMAGES], y[:LARGE_IMAGES]
    threat = ThreatModel("linf", LARGE_RADIUS)
    with torch.no_grad():
        right = model(x).argmax(dim=1) == y
    if not bool(right.any()):
        return []
    generator, objective = torch.Generator().manual_seed(0), WorstPoint(y, margin)
    points = pgd(model, x, y, threat, steps=LARGE_STEPS, generator=generator, objective=objective)
    with torch.no_grad():
        share = (right & (model(points).argmax(dim=1) == y)).float().mean().item()
    if share > LARGE_SHARE:
        return [
            f"{100 * share:.1f} % of images (limit 10 %) survive PGD at Linf 0.5, where any image can become any "
            "other: the attack does not see this model's gradients."
        ]
    return []


def gap_flags(after_pgd: int, robust: int, total: int) -> list[str]:
    """Return a warning if stronger attacks break more than 8 points of the images that survive PGD.

    Honest models lose about a point at 8/255 and five at a radius of 0.1, where 20 steps are few
    (`benchmarks/results/attack_gap.md`). The rule needs 300 images, of which a model that loses five points of all
    images shows more than eight with a probability of one percent.

    Args:
        after_pgd: number of images that survive PGD.
        robust: number of images that survive all attacks.
        total: number of images.
    """
    gap = 100 * (after_pgd - robust) / total
    if gap > PGD_GAP_POINTS and total >= PGD_GAP_IMAGES:
        return [
            f"Stronger attacks found {gap:.1f} points that PGD missed (limit 8): gradients of this model are hard to "
            "follow, and figures under PGD flatter it. Quote the stronger tier."
        ]
    return []


def black_box_flags(what: str, checked: int, broken: int) -> list[str]:
    """Return a warning if the black-box attack breaks more than one image that survived the gradient attacks.

    Args:
        what: the model whose gradients were used, for the message.
        checked: number of survivors that were attacked.
        broken: number of them that were broken.
    """
    if broken > BLACK_BOX_BROKEN:
        return [
            f"A black-box attack broke {broken} of {checked} images that the gradient attacks on {what} had left "
            "(limit 1): its gradients mislead, and the true robust accuracy is lower."
        ]
    return []


def sweep_flags(accuracy: Mapping[float, float]) -> list[str]:
    """Return a warning if robust accuracy rises by more than one point from one radius to the next larger one.

    Args:
        accuracy: robust accuracy in [0, 1] by radius.
    """
    ordered = sorted(accuracy)
    for small, large in pairwise(ordered):
        rise = 100 * (accuracy[large] - accuracy[small])
        if rise > MONOTONE_POINTS:
            return [
                f"Robust accuracy rises by {rise:.1f} points from radius {small:.4g} to {large:.4g} (limit 1), though "
                "the larger ball holds the smaller one: the attack fails on this model."
            ]
    return []


def exported_flags(
    name: str, mismatch: int, total: int, robust: int, exported_robust: int, *, same: bool = True
) -> list[str]:
    """Return warnings if exported file and torch model differ on over 0.5 % of clean images or by over 1 robust point.

    A file that computes something else may well be less robust than the model; if it is more robust, the attacks have
    missed its own weaknesses.

    Args:
        name: name of the file, such as its precision.
        mismatch: number of clean images that the two classify differently.
        total: number of images.
        robust, exported_robust: number of images on which the torch model and the file survive.
        same: whether the file computes what the model computes, up to rounding.
    """
    flags = []
    if mismatch > EXPORTED_CLEAN_SHARE * total:
        share = 100 * mismatch / total
        flags.append(f"The {name} file and the torch model disagree on {share:.1f} % of clean images (limit 0.5 %).")
    gap = 100 * (exported_robust - robust) / total
    if gap > EXPORTED_ROBUST_POINTS:
        flags.append(
            f"The {name} file's robust accuracy is {gap:.1f} points above the torch model's (limit 1): attacks made "
            "for the model flatter the file."
        )
    elif same and -gap > EXPORTED_ROBUST_POINTS:
        flags.append(f"The {name} file's robust accuracy is {-gap:.1f} points below the torch model's (limit 1).")
    return flags
