"""Module Robustness Sensitivity (MRS): the robust loss that a relative perturbation of a module's weights can cost.

    MRS_m(ρ) = max over ‖Δ‖_F <= ρ‖W_m‖_F of  R(θ with W_m + Δ) − R(θ)

R is the mean cross-entropy over a fixed adversarial set in eval mode. The definition is our reading of "Adaptive
Pruning with Module Robustness Sensitivity" (arXiv 2410.15176), built on the Module Robust Criticality of RiFT
(arXiv 2308.02533). The radius is relative to W, so MRS does not change when one layer is scaled up and the next is
scaled down.

The maximum over a ball is not negative and does not decrease with the radius, so the estimators report the largest
increase of the loss found within each radius.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import fastest_layout
from ..models.wrappers import unwrap
from ..recipe import SensitivitySection
from ..runs.parts import Parts
from ..structure.types import ChannelGroup
from .adversarial_set import AdversarialSet
from .aggregation import aggregate_groups
from .losses import LineSearch, RobustLoss, losses_along
from .profile import ModuleSensitivity, SensitivityProfile
from .recordings import bounded
from .replay import NEVER, Trace, trace_calls
from .search import LONG, SHORT, find_directions
from .targets import Target, find_targets

ESTIMATORS = ("gradient", "boundary", "ascent")
DEFAULT_RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
TRACE_IMAGES = 2
GRADIENT_IMAGES = 60
BF16_RHO = 0.03
"""Smallest relative radius at which the search runs in bf16, whose rounding would erase smaller perturbations."""
FINE_BELOW = 0.02
"""Increases of the loss, in nats, below which it is computed again without bf16, whose error is up to 0.001 nats."""


def measure(
    model: nn.Module,
    adv: AdversarialSet,
    section: SensitivitySection | None = None,
    *,
    radii: Sequence[float] = DEFAULT_RADII,
    groups: Sequence[ChannelGroup] = (),
    batch_size: int = 256,
    memory_bytes: int = 2 << 30,
    device: torch.device | str = "cpu",
    parts: Parts | None = None,
) -> SensitivityProfile:
    """Measure the MRS of every convolution, linear layer and attention projection.

    Estimators and their cost over the adversarial set, for K radii (`rho` included):

    - ``gradient``: ρ‖W‖‖∂R/∂W‖, exact to first order. It takes one forward and one backward pass; the curve is linear
      in the radius.
    - ``boundary``: the loss at the ball's boundary, along a direction that a short search finds on few images (see
      `search`). It takes two forward passes and, for each module, K partial forward passes that begin at the module
      (see `replay`), on average about half a forward pass each. The cost of the search does not depend on the size of
      the set.
    - ``ascent``: the same with a longer search, which also continues from the direction found by the short one and
      ends with up to ``section.ascent_steps`` steps on the full set.

    The search and the losses run in bf16 where the hardware supports it; small increases of the loss are computed
    again in the model's own precision. A curve follows the direction found at `rho`; there is no search for each
    radius.

    A module on which the loss does not depend, or whose gradient vanishes on the images of the search, has MRS 0.
    Results are as deterministic as the device's kernels. The model's weights, modes, flags, gradients and hooks are
    restored.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; already on `device`.
        adv: adversarial set, generated at these weights.
        section: estimator, relative radius ``rho`` of the reported MRS, aggregation over a group (see
            `aggregate_groups`) and steps of ``ascent``; by default `SensitivitySection`.
        radii: relative radii of the curves, > 0; ``rho`` is added.
        groups: coupled groups for which MRS is aggregated.
        batch_size: largest number of images in a batch.
        memory_bytes: limit, in bytes, on the activations that recordings and backward passes keep. Batches are reduced
            to fit it, to one image at least, and ascents recompute activations that do not fit. About ten copies of the
            measured weights (three for ``gradient``) come on top.
        device: device on which to compute.
        parts: where what is found of each module is stored, and found again; by default nowhere.

    Returns:
        The profile, with modules in the order of execution and unused ones last.

    Raises:
        UsageError: an argument is out of range, the model has no such layer, or a loss is NaN or infinite.
    """
    section = section or SensitivitySection()
    estimator, rho = section.estimator, section.rho
    _check(radii, batch_size)
    model = unwrap(model)
    all_radii = tuple(sorted({float(r) for r in radii} | {rho}))
    loss = RobustLoss(model, adv, batch_size, torch.device(device))
    with frozen_eval(model), _plain_passes(model):
        targets = find_targets(model)
        weights = list({id(t.weight): t.weight for t in targets}.values())
        few = next(loss.batches())[0][:TRACE_IMAGES]
        loss = replace(loss, layout=fastest_layout(model, few))
        trace = trace_calls(model, few, weights)
        half = memory_bytes // 2  # one half for recordings, one for the current batch
        loss = bounded(loss, trace, weights, half)
        searched = loss if estimator == "gradient" else loss.stratified()
        base, gradients = _gradients(loss if estimator == "gradient" else searched.part(GRADIENT_IMAGES), weights)
        live = [
            (target, gradient)
            for target in {id(t.weight): t for t in targets}.values()
            if (gradient := gradients[id(target.weight)]) is not None
            and float(gradient.norm()) > 0
            and float(target.weight.norm()) > 0
        ]
        if estimator == "gradient":
            rises = {id(t.weight): [r * _norm(t) * float(g.norm()) for r in all_radii] for t, g in live}
        else:
            if rho >= BF16_RHO:
                searched = searched.fast()
            directions = find_directions(searched, trace, live, rho, SHORT, 0, half, parts=parts)
            if estimator == "ascent":
                directions = find_directions(
                    searched, trace, live, rho, LONG, section.ascent_steps, half, others=directions, parts=parts
                )
            base, rises = _along(loss, trace, live, directions, all_radii, parts)
        ordered = sorted(targets, key=lambda t: trace.first_use.get(id(t.weight), NEVER))
        modules = tuple(_result(t, rises.get(id(t.weight)), all_radii, rho) for t in ordered)
    profile = SensitivityProfile(
        estimator=estimator,
        rho=rho,
        radii=all_radii,
        aggregation=section.aggregation,
        base_loss=base,
        images=len(adv),
        seed=adv.seed,
        threat=adv.threat,
        modules=modules,
    )
    return aggregate_groups(profile, groups, section.aggregation)


def _check(radii: Sequence[float], batch_size: int) -> None:
    if not all(math.isfinite(r) and r > 0 for r in radii):
        raise UsageError(f"radii must be finite and > 0, got {tuple(radii)}. Try 0.1.")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")


@contextmanager
def _plain_passes(model: nn.Module) -> Iterator[None]:
    """Disable the attention fast path and gradient checkpointing inside the block.

    The fast path runs only without gradients and hides inner modules. A checkpointed block runs again during the
    backward pass, when recorded outputs and exchanged weights are no longer in place.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    checkpointing = [module for module in model.modules() if getattr(module, "grad_checkpointing", False) is True]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in checkpointing:
            module.grad_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for module in checkpointing:
            module.grad_checkpointing = True  # type: ignore[assignment]


def _norm(target: Target) -> float:
    return float(target.weight.detach().norm())


def _gradients(loss: RobustLoss, weights: list[nn.Parameter]) -> tuple[float, dict[int, Tensor | None]]:
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with track("Sensitivity, gradients", loss.num_batches) as advance:
            base, found = loss.gradients(weights, advance)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return base, {id(weight): gradient for weight, gradient in zip(weights, found, strict=True)}


def _along(
    loss: RobustLoss,
    trace: Trace,
    live: list[tuple[Target, Tensor]],
    directions: list[Tensor],
    radii: tuple[float, ...],
    parts: Parts | None,
) -> tuple[float, dict[int, list[float]]]:
    """Return R and, for each target, its increase at each radius."""
    line_searches = [
        LineSearch(t, d, tuple(r * _norm(t) for r in radii)) for (t, _), d in zip(live, directions, strict=True)
    ]
    fast = loss.fast()
    base, rises = _rises(fast, trace, line_searches, "losses", parts)
    if fast.bf16:
        small = [[k for k, rise in enumerate(row) if abs(rise) < FINE_BELOW] for row in rises]
        rows = [i for i, found in enumerate(small) if found]
        again = [replace(line_searches[i], lengths=tuple(line_searches[i].lengths[k] for k in small[i])) for i in rows]
        exact = _rises(loss, trace, again, "small losses", parts)[1] if again else []
        for i, values in zip(rows, exact, strict=True):
            for k, value in zip(small[i], values, strict=True):
                rises[i][k] = value
    return base, {id(line.target.weight): row for line, row in zip(line_searches, rises, strict=True)}


def _rises(
    loss: RobustLoss, trace: Trace, line_searches: list[LineSearch], name: str, parts: Parts | None
) -> tuple[float, list[list[float]]]:
    base, losses = losses_along(loss, trace, line_searches, parts, name)
    return base, [[value - base for value in row] for row in losses]


def _result(target: Target, rises: list[float] | None, radii: tuple[float, ...], rho: float) -> ModuleSensitivity:
    curve = tuple(accumulate((max(0.0, rise) for rise in rises), max)) if rises else (0.0,) * len(radii)
    return ModuleSensitivity(target.name, target.kind, curve[radii.index(rho)], _norm(target), curve)
