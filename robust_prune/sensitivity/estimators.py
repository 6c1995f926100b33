"""Module Robustness Sensitivity (MRS): how much robust loss a relative weight perturbation can cost a module.

    MRS_m(ρ) = max over ‖Δ‖_F <= ρ‖W_m‖_F of  R(θ with W_m + Δ) − R(θ)

R is the mean cross-entropy over a fixed adversarial set in eval mode. The definition is our reading of "Adaptive
Pruning with Module Robustness Sensitivity" (arXiv 2410.15176), built on the Module Robust Criticality of RiFT
(arXiv 2308.02533). Because Δ is relative to W, the value does not change when a layer is scaled up and its follower
down.

A maximum over a ball cannot fall as the ball grows and cannot be negative, so the estimators report the largest loss
increase that they saw within each radius.
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
from ..structure.types import ChannelGroup
from .adversarial_set import AdversarialSet
from .groups import aggregate_groups
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
"""Relative radius below which bf16 would round a perturbation of the weights away, so that the search is not in it."""
FINE_BELOW = 0.02
"""Rises of the loss, in nats, below which bf16 is not fine enough: its rounding moves a mean loss by up to 0.001."""


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
) -> SensitivityProfile:
    """Measures the MRS of every convolution, linear layer and attention projection.

    Estimators, with their cost in passes over the adversarial set for M modules and K radii (`rho` included):

    - ``gradient``: ρ‖W‖‖∂R/∂W‖, exact to first order. One forward and backward; the curve is linear in the radius.
    - ``boundary``: the real loss at the ball's boundary, along a direction that a short search finds on few images (see
      `search`). Two forwards more than K partial forwards a module; each begins at the module (see `replay`), about
      half a forward on average. The search costs the same however large the set.
    - ``ascent``: the same with a longer search, which also goes on from where the short one arrives and ends in up to
      ``section.ascent_steps`` steps on the whole set.

    Search and losses are computed in bf16 where the hardware has it, and small losses again in the model's own
    precision. Curves go along the direction found at `rho`, rather than searching again at each radius.

    A module that the loss does not depend on, or whose gradient vanishes on the search's images, has MRS 0. Results
    are deterministic as far as the device's kernels are. The model leaves as it came: weights, modes, flags, gradients
    and hooks.

    Args:
        model: maps [0, 1] images to logits; already on `device`.
        adv: the adversarial set, made at these weights.
        section: estimator, relative radius ``rho`` of the reported MRS, aggregation over a group (see
            `aggregate_groups`), steps of ``ascent``; the defaults of recipes without it.
        radii: relative radii of the curves, > 0; ``rho`` is added.
        groups: coupled groups to aggregate for.
        batch_size: most images per pass.
        memory_bytes: limit on what recordings and backward passes keep of the images: batches are made smaller to fit
            (of one image at least), and ascents compute again what does not. On top come about ten copies of the
            measured weights, for ``gradient`` three.
        device: where to compute.

    Returns:
        The profile, modules in the order of execution (unused ones last).

    Raises:
        UsageError: an argument out of range, a model without such layers, or a loss that is NaN or infinite.
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
        half = memory_bytes // 2  # for what is kept, and for the batch that is at work
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
            directions = find_directions(searched, trace, live, rho, SHORT, 0, half)
            if estimator == "ascent":
                directions = find_directions(
                    searched, trace, live, rho, LONG, section.ascent_steps, half, others=directions
                )
            base, rises = _along(loss, trace, live, directions, all_radii)
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
    """Keeps attention on one code path, and timm's models from checkpointing.

    Fused attention runs without gradients only and hides its inner modules; a checkpointed part runs again during the
    backward pass, when its recorded outputs and exchanged weights are gone.
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
) -> tuple[float, dict[int, list[float]]]:
    """R, and by target how much it rises at each radius."""
    line_searches = [
        LineSearch(t, d, tuple(r * _norm(t) for r in radii)) for (t, _), d in zip(live, directions, strict=True)
    ]
    fast = loss.fast()
    base, rises = _rises(fast, trace, line_searches, "Sensitivity, losses")
    if fast.bf16:
        small = [[k for k, rise in enumerate(row) if abs(rise) < FINE_BELOW] for row in rises]
        rows = [i for i, found in enumerate(small) if found]
        again = [replace(line_searches[i], lengths=tuple(line_searches[i].lengths[k] for k in small[i])) for i in rows]
        exact = _rises(loss, trace, again, "Sensitivity, small losses")[1] if again else []
        for i, values in zip(rows, exact, strict=True):
            for k, value in zip(small[i], values, strict=True):
                rises[i][k] = value
    return base, {id(line.target.weight): row for line, row in zip(line_searches, rises, strict=True)}


def _rises(
    loss: RobustLoss, trace: Trace, line_searches: list[LineSearch], label: str
) -> tuple[float, list[list[float]]]:
    with track(label, loss.num_batches * len(line_searches)) as advance:
        base, losses = losses_along(loss, trace, line_searches, advance)
    return base, [[value - base for value in row] for row in losses]


def _result(target: Target, rises: list[float] | None, radii: tuple[float, ...], rho: float) -> ModuleSensitivity:
    curve = tuple(accumulate((max(0.0, rise) for rise in rises), max)) if rises else (0.0,) * len(radii)
    return ModuleSensitivity(target.name, target.kind, curve[radii.index(rho)], _norm(target), curve)
