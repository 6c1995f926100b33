"""How much each channel of a coupled group matters, relative to the other channels of that group.

**What Taylor means here.** Removing channel c from a network is, whatever produced it, the same as setting the weights
that *read* it to zero: its coupled ``in`` slices. The first-order change of the loss is therefore -t_c with
``t_c = Σ w·∂R/∂w`` over all ``in`` slices of c, signs kept, since the slices go together. The slices that *write* c
describe the same removal a second time, so adding them would count it twice: behind conv, batch-norm and ReLU,
``Σ w·∂R/∂w`` over the batch-norm's weight and bias *equals* t_c, while the convolution's own sum leaves out what the
batch-norm's bias adds. So batch-norm is in t_c without being listed. Groups that no known layer reads fall back on
the norm slices, then on the ``out`` slices.

Attention is the exception, since no weight reads queries and keys: they meet in a product. Dimension d takes with it
the value's share, ``t_v``, which is what the projection's ``in`` slice says, and one term of the logits, which
query and key each tell whole: ``t_q = t_k``. The ``out`` slices sum to ``t_q + t_k + t_v``, so half of ``out`` and
half of ``in`` together are the effect ``t_q + t_v``.

**Why squares.** At a trained model the mean of t_c is close to zero, being a derivative at a minimum, and what is left
is noise. So t_c is taken over small batches b of fixed size and the score is ``sqrt(mean_b t_{c,b}²)``: the mean's
magnitude plus the spread, which is the empirical Fisher estimate of the second-order term (as in Molchanov et al.,
2019, arXiv 1906.10771). With a single batch it is plain |t_c|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..models.wrappers import unwrap
from ..recipe import Criterion
from ..structure.attention import find_attention
from ..structure.types import ChannelGroup, GroupSlice
from .group_weights import parameters_of, per_channel, weight_of
from .torch_pruning import BASELINES, baseline_scores

if TYPE_CHECKING:
    from ..sensitivity.adversarial_set import AdversarialSet

CRITERIA: tuple[str, ...] = get_args(Criterion)
TAYLOR_BATCH = 32


def channel_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str = "adversarial_taylor",
    adv: AdversarialSet | None = None,
    clean: tuple[Tensor, Tensor] | None = None,
    *,
    batch_size: int = TAYLOR_BATCH,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Scores the channels of every group: higher is more important, mean 1 within each group.

    Criteria:

    - ``adversarial_taylor``: see the module's docstring, with R the cross-entropy on `adv`.
    - ``clean_taylor``: the same on `clean`.
    - ``magnitude``: L2 norm of the producers' output slices (weights, without biases).
    - ``group_norm``: L2 norm of all coupled weights: ``out``, ``in``, norm weights and free parameters.
    - ``bn_scale``: mean |weight| of the coupled batch-norms (network slimming, arXiv 1708.06519); groups without
      batch-norm use ``magnitude``.
    - ``random``: uniform noise under `seed`.
    - ``fpgm``, ``hessian``, ``lamp``: torch-pruning's, see `baseline_scores`.

    Args:
        model: on `device`; left as it came.
        groups: of this model.
        criterion: one of `CRITERIA`.
        adv: needed by ``adversarial_taylor``.
        clean: float images [N, C, H, W] in [0, 1] and int64 labels [N]; needed by ``clean_taylor`` and ``hessian``.
        batch_size: most images per pass. Taylor never takes more than `TAYLOR_BATCH`, so that scores do not depend on
            how much memory a machine has.
        seed: of ``random``.
        device: where to compute.

    Returns:
        By group name, float64 [channels] on the CPU. A group whose scores are all zero keeps zeros.

    Raises:
        UsageError: an unknown criterion, missing images, scores that are NaN or infinite, no batch-norm anywhere for
            ``bn_scale``, or a group with no layer that the criterion can read.
    """
    if criterion not in CRITERIA:
        raise UsageError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    model = unwrap(model)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        raw = {g.name: torch.rand(g.channels, generator=generator, dtype=torch.float64) for g in groups}
    elif criterion in ("adversarial_taylor", "clean_taylor"):
        images, labels = _images(criterion, adv, clean)
        raw = _taylor(model, groups, images, labels, min(batch_size, TAYLOR_BATCH), torch.device(device))
    elif criterion == "bn_scale":
        raw = _bn_scale(model, groups)
    elif criterion in BASELINES:
        raw = baseline_scores(model, groups, criterion, clean, torch.device(device))
    else:
        keep: Callable[[GroupSlice], bool] = _is_out if criterion == "magnitude" else _is_any
        raw = {g.name: _weight_norm(model, g, keep) for g in groups}
    return {name: _normalised(name, criterion, scores) for name, scores in raw.items()}


def removal_order(group: ChannelGroup, scores: Tensor) -> Tensor:
    """Channels in the order in which they go, least important first.

    With `blocks` > 1 the order takes one channel from every block in turn, so that each multiple of `blocks` is a cut
    that keeps the blocks equal.

    Args:
        group: the group.
        scores: [channels].

    Returns:
        A permutation of 0..channels-1 (int64, [channels]); ties keep their order.

    Raises:
        UsageError: one score a channel is needed.
    """
    if scores.shape != (group.channels,):
        raise UsageError(f"group {group.name!r} has {group.channels} channels, got scores of {tuple(scores.shape)}")
    rows = scores.view(group.blocks, -1)
    order = rows.argsort(dim=1, stable=True) + torch.arange(group.blocks).unsqueeze(1) * rows.shape[1]
    return order.t().reshape(-1)


def removed_fraction_curve(model: nn.Module, group: ChannelGroup, scores: Tensor) -> Tensor:
    """Relative size ρ_g(k) of the weight perturbation that removing the k least important channels is.

    ρ_g(k) = ‖removed output slices‖_F / ‖W_g‖_F over the group's producers, with W_g their whole weights, so that it
    is on the scale of MRS's radii.

    Args:
        model: that the group belongs to.
        group: the group.
        scores: [channels]; the order is `removal_order`'s.

    Returns:
        float64 [channels + 1], ascending from 0; it ends at 1 if the group cuts all of its producers' outputs. All 0 if
        their weights are zero.

    Raises:
        UsageError: the producers' weights are not finite, or of a kind that cannot be read.
    """
    model = unwrap(model)
    energy = _weight_norm(model, group, _is_out).square()
    weights = {id(w): w for s in group.slices if _is_out(s) and (w := weight_of(model, s)) is not None}
    total = sum(float(w.detach().double().square().sum()) for w in weights.values())
    if not (math.isfinite(total) and torch.isfinite(energy).all()):
        raise UsageError(f"the weights of group {group.name!r} have norm {total**0.5}, expected a finite number")
    if total == 0:
        return energy.new_zeros(group.channels + 1)
    removed = energy[removal_order(group, scores)].cumsum(0) / total
    return torch.cat([removed.new_zeros(1), removed.clamp(max=1.0).sqrt()])


def _is_out(part: GroupSlice) -> bool:
    return part.side == "out"


def _is_any(part: GroupSlice) -> bool:
    return True


def _images(criterion: str, adv: AdversarialSet | None, clean: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if criterion == "adversarial_taylor":
        if adv is None:
            raise UsageError("criterion 'adversarial_taylor' needs an adversarial set, got none")
        return adv.images, adv.labels
    if clean is None or len(clean[1]) == 0:
        raise UsageError("criterion 'clean_taylor' needs clean images and labels, got none")
    return clean


def _normalised(name: str, criterion: str, scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise UsageError(
            f"{criterion} gives {bad} of {len(scores)} channels of group {name!r} a score that is NaN or infinite. "
            "Check the model's weights; a diverged training leaves such values."
        )
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def _weight_norm(model: nn.Module, group: ChannelGroup, keep: Callable[[GroupSlice], bool]) -> Tensor:
    """L2 norm per channel of the weights (not biases) of the group's slices."""
    squares = torch.zeros(group.channels, dtype=torch.float64)
    seen = False
    for part in group.slices:
        weight = weight_of(model, part)
        if keep(part) and weight is not None:
            squares += per_channel(model, part, weight.detach().double().square(), group.channels)
            seen = True
    if not seen:
        raise UsageError(f"group {group.name!r} has no convolution or linear layer whose weights could be scored")
    return squares.sqrt()


def _bn_scale(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    found = False
    for group in groups:
        total, count = torch.zeros(group.channels, dtype=torch.float64), 0
        for part in group.slices:
            weight = weight_of(model, part)
            if part.side == "norm" and weight is not None and _is_batch_norm(model, part):
                total += per_channel(model, part, weight.detach().double().abs(), group.channels)
                count += 1
        found |= count > 0
        scores[group.name] = total / count if count else _weight_norm(model, group, _is_out)
    if groups and not found:
        raise UsageError("criterion 'bn_scale' needs batch-norm layers, the model's groups have none. Try 'magnitude'.")
    return scores


def _is_batch_norm(model: nn.Module, part: GroupSlice) -> bool:
    return isinstance(model.get_submodule(part.target), nn.modules.batchnorm._BatchNorm)


def _face(model: nn.Module, group: ChannelGroup, attention: bool) -> list[tuple[GroupSlice, float]]:
    """Slices with factors such that their w·∂R/∂w tell the effect of removing a channel exactly once."""
    if attention:
        return [(s, 0.5) for s in group.slices if s.side in ("out", "in") and parameters_of(model, s)]
    for sides in (("in",), ("norm", "param"), ("out",)):
        face = [s for s in group.slices if s.side in sides and parameters_of(model, s)]
        if {channel for s in face for channel in s.root} >= set(range(group.channels)):
            return [(s, 1.0) for s in face]
    raise UsageError(f"group {group.name!r} has no convolution, linear or norm layer that Taylor scores could use")


def _taylor(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    squares = {group.name: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    dtype = weights_dtype(model)
    with frozen_eval(model), track("Channel importance, Taylor", len(labels)) as advance:
        roots = {block.producers[0] for block in find_attention(model, images[:1].to(device, dtype))}
        faces = {group.name: _face(model, group, group.name in roots) for group in groups}
        weights = list({id(w): w for face in faces.values() for s, _ in face for w in parameters_of(model, s)}.values())
        for weight in weights:
            weight.requires_grad_(True)
        for start in range(0, len(labels), batch_size):
            x, y = images[start : start + batch_size].to(device, dtype), labels[start : start + batch_size].to(device)
            products = _products(model, x, y, weights)
            for group in groups:
                change = torch.zeros(group.channels, dtype=torch.float64)
                for part, factor in faces[group.name]:
                    for weight in parameters_of(model, part):
                        if (product := products[id(weight)]) is not None:
                            change += factor * per_channel(model, part, product, group.channels)
                squares[group.name] += change.square() * len(y)
            advance(len(y))
    return {name: (total / len(labels)).sqrt() for name, total in squares.items()}


def _products(model: nn.Module, x: Tensor, y: Tensor, weights: list[nn.Parameter]) -> dict[int, Tensor | None]:
    """w·∂R/∂w elementwise for each weight; None for weights that the loss does not reach."""
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(weights, gradients, strict=True)
    return {id(w): None if g is None else w.detach() * g for w, g in pairs}
