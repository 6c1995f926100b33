"""The choice of the normalization of weights that do not say which one they were trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.base import DataBundle, stratified_images
from ..errors import UsageError
from ..introspect.modes import eval_mode
from .normalization import AUTO, FORMS, Normalization, common_normalizations, no_normalization
from .state_dict import MEAN_NAMES, STD_NAMES

FIRST_IMAGES, MOST_IMAGES = 64, 400
"""Number of images on which all candidates are scored, and to which it grows while several remain."""

OPERATIONS = 1e12
"""Floating-point operations that the larger number of images may cost: about ten seconds on one core."""

BATCH = 64
_LEAD, _SAFE_LEAD = 2.0, 3.0
_ABOVE_CHANCE, _UNTRAINED_LOSS = 3.0, 0.95
_CLEAR_GAP, _SMALL_GAP, _LARGE_GAP, _FAR = 0.5, 0.2, 0.5, 10.0
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Score:
    """How a network fares with one normalization.

    Attributes:
        normalization: the normalization.
        right: whether each image is classified correctly, bool [N].
        loss: mean cross-entropy divided by that of a constant answer; 1 for a network that was not trained.
        gap: distance of the inputs of the first batch-norm layer from its running statistics, 0 for equal ones; None
            without batch-norm layers that were trained.
    """

    normalization: Normalization
    right: Tensor
    loss: float
    gap: float | None

    def __str__(self) -> str:
        return f"{self.normalization.name} {100 * self.right.float().mean().item():.1f} %"

    @property
    def count(self) -> int:
        """Number of images that are classified correctly."""
        return int(self.right.sum())


@dataclass(frozen=True)
class Choice:
    """A normalization, and one sentence on why it was chosen."""

    normalization: Normalization
    reason: str


def normalizes_inside(module: nn.Module, channels: int) -> bool:
    """Return whether a part of `module` has a mean and a deviation for each of `channels` channels.

    Such parts normalize the images themselves, as the networks of RobustBench do. Buffers, parameters and plain
    attributes are looked at.
    """
    return any(_has(part, MEAN_NAMES, channels) and _has(part, STD_NAMES, channels) for part in module.modules())


def _has(part: nn.Module, names: Sequence[str], channels: int) -> bool:
    values = (getattr(part, name, None) for name in names)
    return any(
        (value.numel() if isinstance(value, Tensor) else len(value)) == channels
        for value in values
        if isinstance(value, Tensor | tuple | list)
    )


def choose(network: nn.Module, data: DataBundle, expected: Normalization | None = None, why: str = "") -> Choice:
    """Measure which normalization `network` was trained with.

    Candidates are scored on training images. One of them is chosen if no other is as accurate within the noise of the
    images; otherwise the `expected` one, or the one with which the inputs of batch-norm layers best fit their running
    statistics, or, among nearly equal ones, that of the data. Where the inputs of the first batch-norm layer fit with
    one candidate and are far off with all others, that one is chosen, also for weights that were damaged by a mask.

    Args:
        network: maps normalized images [N, C, H, W] to logits [N, K]; its state is not changed.
        data: data set, whose training images are used.
        expected: normalization that a configuration or the network itself suggests.
        why: reason of the expectation, for the sentence.

    Raises:
        UsageError: several normalizations that differ are equally accurate, or none fits.
    """
    candidates = list(common_normalizations(data))
    if expected is not None:
        same = [c for c in candidates if (c.mean, c.std) == (expected.mean, expected.std)]
        expected = same[0] if same else expected
        candidates += [] if same else [expected]
    if len(data.train) == 0:
        return Choice(expected, why) if expected is not None else Choice(candidates[1], "no images to measure with")
    scores, chance = score(network, data, candidates, FIRST_IMAGES)
    figures = _figures(scores)
    left = _left(scores)
    count = _affordable(network, data, len(left))
    if len(left) > 1 and count > FIRST_IMAGES:
        scores, chance = score(network, data, [s.normalization for s in left], count)
        figures += f"; then {_figures(scores)}"
    return decide(scores, chance, expected, why, figures)


def score(
    network: nn.Module, data: DataBundle, candidates: Sequence[Normalization], count: int = FIRST_IMAGES
) -> tuple[list[Score], float]:
    """Score each candidate on the same `count` training images, in eval mode.

    Returns:
        The scores, and the share of the most frequent class among the images, in [0, 1].
    """
    parameter = next(network.parameters(), torch.zeros(()))
    images, labels = stratified_images(data.train, count)
    images = images.to(parameter.device, parameter.dtype)
    with eval_mode(network), torch.no_grad(), _seeded():
        scores = [_scored(network, candidate, images, labels) for candidate in candidates]
    return scores, labels.bincount().max().item() / len(labels)


def _left(scores: Sequence[Score]) -> list[Score]:
    """Return the candidates between which the first images do not decide."""
    best = max(scores, key=lambda s: s.count)
    left = [s for s in scores if not is_behind(s.right, best.right, _SAFE_LEAD)]
    clear = _decisive(scores) or _clearly_fitting(left)
    return [clear] if clear is not None and (clear.gap or 0.0) < _SMALL_GAP else left


def _affordable(network: nn.Module, data: DataBundle, candidates: int) -> int:
    # Operations instead of seconds, so that a busy machine makes no other choice. With gradients, since without them
    # the counter fails in nn.MultiheadAttention.
    images, _ = stratified_images(data.train, 1)
    parameter = next(network.parameters(), torch.zeros(()))
    with eval_mode(network), torch.enable_grad(), _seeded(), FlopCounterMode(display=False) as counter:
        network(images.to(parameter.device, parameter.dtype))
    return min(MOST_IMAGES, len(data.train), int(OPERATIONS / (max(counter.get_total_flops(), 1) * candidates)))


def _figures(scores: Sequence[Score]) -> str:
    return f"{len(scores[0].right)} training images: {', '.join(map(str, scores))}"


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _scored(network: nn.Module, candidate: Normalization, images: Tensor, labels: Tensor) -> Score:
    with _gaps(network) as gaps:
        logits = [network(candidate(batch)).float().cpu() for batch in images.split(BATCH)]
    answers = torch.cat(logits)
    loss = F.cross_entropy(answers, labels).item() / math.log(answers.shape[1])
    return Score(candidate, answers.argmax(dim=1) == labels, loss, sum(gaps) / len(gaps) if gaps else None)


@contextmanager
def _gaps(network: nn.Module) -> Iterator[list[float]]:
    """Collect the distance of the input of the first trained batch-norm layer from its running statistics."""
    found: list[float] = []
    first: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        first.append(module)
        if module is not first[0]:
            return
        x = inputs[0].detach().float()
        dims = [0, *range(2, x.ndim)]
        assert isinstance(module, _BATCH_NORMS) and module.running_mean is not None and module.running_var is not None
        mean, var = module.running_mean.float(), module.running_var.float() + module.eps
        shift = (x.mean(dims) - mean).square() / var
        stretch = ((x.var(dims) + module.eps) / var).log().square()
        alive = x.var(dims) > 0  # a masked channel is constant
        if bool(alive.any()):
            found.append((shift + stretch)[alive].mean().item())

    layers = [m for m in network.modules() if isinstance(m, _BATCH_NORMS) and _trained(m)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _trained(layer: nn.Module) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return (
        isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and not (bool((mean == 0).all()) and bool((var == 1).all()))
    )


def decide(
    scores: Sequence[Score], chance: float, expected: Normalization | None = None, why: str = "", figures: str = ""
) -> Choice:
    """Return the choice that follows from `scores`, with `chance` the accuracy of a constant answer; see `choose`.

    Raises:
        UsageError: several normalizations that differ are equally accurate.
    """
    figures = figures or _figures(scores)
    best = max(scores, key=lambda s: s.count)
    fitting = _decisive(scores)
    tied = [fitting] if fitting else [s for s in scores if not is_behind(s.right, best.right)]
    undecided = not (len(tied) == 1 or _clearly_fitting(tied) or _no_difference(tied))
    _check_fit(tied, scores, expected, figures)
    untrained = best.loss > _UNTRAINED_LOSS and (undecided or expected is not None)
    if untrained or not _above_chance(best, chance):
        taken = expected or (fitting or _clearly_fitting(scores) or _of_data_first(scores)).normalization
        return Choice(
            taken,
            f"not decided by {figures}; the model answers like one that is not trained, or its classes are others",
        )
    close = fitting is not None and expected is not None and expected.similar(fitting.normalization)
    if expected is not None and (close or any(s.normalization == expected for s in tied)):
        return Choice(expected, f"{why}; {figures}")
    if not undecided:
        taken = (tied[0] if len(tied) == 1 else _clearly_fitting(tied) or _of_data_first(tied)).normalization
        against = f", not {expected.name}: {why}" if expected is not None else ""
        return Choice(taken, f"measured on {figures}{against}")
    names = " and ".join(s.normalization.name for s in tied)
    raise UsageError(
        f"the normalization of these weights is not known, and {names} are equally accurate on {figures}. Say which "
        f"one they were trained with: --normalization {FORMS.replace(f'{AUTO}, ', '')}."
    )


def _check_fit(tied: Sequence[Score], scores: Sequence[Score], expected: Normalization | None, figures: str) -> None:
    """Refuse to choose where the first batch-norm layer says that its inputs were others with every candidate."""
    if expected is None and all(s.gap is not None and s.gap > _LARGE_GAP for s in (*tied, *scores)):
        raise UsageError(
            f"the normalization of these weights is not known, and with none of the usual ones the inputs of the first "
            f"batch-norm layer are like those of the training ({figures}). Say which one they were trained with: "
            f"--normalization {FORMS.replace(f'{AUTO}, ', '')}."
        )


def _decisive(scores: Sequence[Score]) -> Score | None:
    """Return the candidate whose batch-norm inputs fit while those of all that differ from it are far off."""
    known = [s for s in scores if s.gap is not None]
    first = min(known, key=lambda s: s.gap or 0.0, default=None)
    if first is None or (first.gap or 0.0) > _SMALL_GAP:
        return None
    others = [s.gap or 0.0 for s in known if not s.normalization.similar(first.normalization)]
    if not others or min(others) <= max(_LARGE_GAP, _FAR * (first.gap or 0.0)):
        return None
    # Between similar ones a little less distance decides nothing: attacked and cropped images shift the statistics.
    near = [s for s in known if (s.gap or 0.0) * _CLEAR_GAP <= (first.gap or 0.0)]
    return _of_data_first(near) if first in near else first


def _above_chance(best: Score, chance: float) -> bool:
    count = len(best.right)
    return best.count > count * chance + _ABOVE_CHANCE * (count * chance * (1 - chance)) ** 0.5


def is_behind(right: Tensor, best: Tensor, deviations: float = _LEAD) -> bool:
    """Return whether answers, correct or not (bool [N]), are worse than others to the same images, beyond noise.

    The limit is a number of standard deviations of the difference that chance alone would make.
    """
    lead = int((best & ~right).sum()) - int((right & ~best).sum())
    return lead > deviations * int((best ^ right).sum()) ** 0.5


def _clearly_fitting(tied: Sequence[Score]) -> Score | None:
    ranked = sorted((s for s in tied if s.gap is not None), key=lambda s: s.gap or 0.0)
    if len(ranked) < 2:
        return None
    first, second = ranked[0], ranked[1]
    return first if (first.gap or 0.0) < _CLEAR_GAP * (second.gap or 0.0) else None


def _no_difference(tied: Sequence[Score]) -> bool:
    """Return whether the choice does not matter: similar numbers, or the same answers, as where the scale is undone."""
    return all(a.normalization.similar(b.normalization) or bool((a.right == b.right).all()) for a in tied for b in tied)


def _of_data_first(tied: Sequence[Score]) -> Score:
    return next((s for s in tied if s.normalization.name == "data"), tied[0])


def inside(channels: int) -> tuple[Normalization, str]:
    """Return the normalization for a network that normalizes by itself, and the reason."""
    return no_normalization(channels), "the model normalizes inside"
