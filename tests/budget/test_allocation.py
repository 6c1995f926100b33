"""Widths under a budget: the optimum, the lattice, the floors."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_prune.attacks import ThreatModel
from robust_prune.budget.allocation import Problem
from robust_prune.budget.allocation import allocate as allocate_by_section
from robust_prune.budget.allocations.mrs import cut_losses
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import CostModel, QuadraticForm
from robust_prune.budget.cut_losses import CutLoss
from robust_prune.budget.rounding import allowed_widths, floor_of, round_to_budget
from robust_prune.catalogue import ALLOCATIONS
from robust_prune.errors import UsageError
from robust_prune.recipe import PruningSection
from robust_prune.recipe_reader import make_section
from robust_prune.sensitivity.profile import GroupSensitivity, SensitivityProfile
from robust_prune.structure.groups import GroupSearch
from robust_prune.structure.types import ChannelGroup

RADII = (0.05, 0.1, 0.2, 0.4, 0.8)


def network(widths, layers, head=0):
    """Groups and cost of convs given as (input group or None for the image, output group, positions, kernel area)."""
    n = len(widths)
    forms = {}
    for metric in ("macs", "params"):
        linear, quadratic = np.zeros(n), np.zeros((n, n))
        for source, target, positions, area in layers:
            share = area * (positions if metric == "macs" else 1)
            if source is None:
                linear[target] += 3 * share
            else:
                quadratic[source, target] += share / 2
                quadratic[target, source] += share / 2
        linear[-1] += head
        forms[metric] = QuadraticForm(0.0, linear, quadratic)
    forms["channels"] = QuadraticForm(0.0, np.ones(n), np.zeros((n, n)))
    groups = [ChannelGroup(f"g{i}", w, ()) for i, w in enumerate(widths)]
    return groups, CostModel(tuple(g.name for g in groups), np.array(widths, dtype=float), forms)


def resnet18():
    """ResNet-18 for 32x32: four residual streams, two inside widths each."""
    widths, layers, stream = [], [], None
    for stage, (width, side) in enumerate(((64, 32), (128, 16), (256, 8), (512, 4))):
        here, one, two = 3 * stage, 3 * stage + 1, 3 * stage + 2
        widths += [width] * 3
        area = side * side
        layers += [(stream if stage else None, here, area, 1 if stage else 9)]
        layers += [(stream if stage else here, one, area, 9), (one, here, area, 9)]
        layers += [(here, two, area, 9), (two, here, area, 9)]
        stream = here
    return network(widths, layers, head=10)


def vgg16():
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    layers = [(i - 1 if i else None, i, side * side, 9) for i, side in enumerate(sides)]
    return network(widths, layers, head=10)


def bottlenecks():
    """The size of a ResNet-50: 37 groups."""
    widths, layers, stream = [], [], None
    for stage, (width, blocks, side) in enumerate(((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))):
        here = len(widths)
        widths.append(4 * width)
        area = side * side
        layers.append((stream, here, area, 49 if stage == 0 else 1))
        for _ in range(blocks):
            one, two = len(widths), len(widths) + 1
            widths += [width, width]
            layers += [(here, one, area, 1), (one, two, area, 9), (two, here, area, 1)]
        stream = here
    return network(widths, layers, head=1000)


def profile_of(groups, mrs, powers):
    curves = [tuple(m * (r / 0.1) ** p for r in RADII) for m, p in zip(mrs, powers, strict=True)]
    found = tuple(GroupSensitivity(g.name, m, c) for g, m, c in zip(groups, mrs, curves, strict=True))
    return SensitivityProfile("boundary", 0.1, RADII, "sum", 1.5, 256, 0, ThreatModel(), (), found)


def allocate(allocation, groups, cost, budget, metric="macs", profile=None, scores=None, removed=None, **section):
    """`allocate` with MRS at its word, and losses of real cuts that grow as fast as the curves do."""
    found = {} if profile is None else {g.name: g.mrs for g in profile.groups}
    cuts = {
        g.name: tuple(CutLoss(g.channels // n, found[g.name] * (n - 1) ** 2 / n, 1e-4) for n in (8, 4, 2))
        for g in groups if g.name in found
    }  # fmt: skip
    analysis = Analysis(GroupSearch(tuple(groups), ()), cost, profile, scores, removed, "", cuts)
    settings = make_section(PruningSection, allocation=allocation, metric=metric, mrs_exponent=1, **section)
    return allocate_by_section(analysis, settings, budget)


def losses_of(groups, profile, removed):
    problem = Problem(groups, None, 0, None, None, PruningSection(), profile, None, removed)
    return cut_losses(problem, profile)


def inputs(groups, seed=0):
    """Heavy-tailed sensitivities, scores and removed fractions, as real models show them."""
    rng = np.random.default_rng(seed)
    mrs = np.exp(rng.normal(-0.5, 1.2, len(groups))).tolist()
    profile = profile_of(groups, mrs, rng.uniform(1.0, 2.5, len(groups)).tolist())
    energies = {g.name: np.sort(rng.gamma(3.0, size=g.channels)) for g in groups}
    fractions = {
        k: torch.tensor(np.sqrt(np.concatenate([[0.0], v.cumsum() / v.sum()])).clip(max=1)) for k, v in energies.items()
    }
    return profile, {k: torch.tensor(v) for k, v in energies.items()}, fractions


def equal_channels(groups):
    """Removed fractions of channels that all weigh the same."""
    return {g.name: torch.linspace(0, 1, g.channels + 1, dtype=torch.float64).sqrt() for g in groups}


NETWORKS = {"resnet18": resnet18(), "vgg16": vgg16(), "bottlenecks": bottlenecks()}


@pytest.mark.parametrize("metric", ["macs", "params", "channels"])
@pytest.mark.parametrize("allocation", ALLOCATIONS.names)
@pytest.mark.parametrize("name", NETWORKS)
def test_budgets_are_hit_on_aligned_widths(name, allocation, metric):
    groups, cost = NETWORKS[name]
    dense = cost.cost({}, metric)
    floors = {g.name: floor_of(g, 0.1) for g in groups}
    for ratio in (0.25, 0.5, 0.75, 0.9):
        if cost.cost(floors, metric) > (1 - ratio) * dense:
            continue  # 90 % of the channels are just the floors
        keep = allocate(allocation, groups, cost, (1 - ratio) * dense, metric, *inputs(groups))
        assert abs(cost.cost(keep, metric) / dense - (1 - ratio)) <= 0.01
        assert all(floors[g.name] <= keep[g.name] <= g.channels for g in groups)
        assert sum(k % 8 != 0 for k in keep.values()) <= 1


def test_a_resnet50_sized_problem_is_quick():
    groups, cost = NETWORKS["bottlenecks"]
    given_inputs = inputs(groups)
    start = time.process_time()
    allocate("mrs", groups, cost, 0.3 * cost.macs({}), "macs", *given_inputs)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("allocation", ALLOCATIONS.names)
def test_a_larger_ratio_never_keeps_more(allocation):
    groups, cost = NETWORKS["resnet18"]
    dense = cost.macs({})
    left = [
        cost.macs(allocate(allocation, groups, cost, (1 - r / 100) * dense, "macs", *inputs(groups)))
        for r in range(5, 100, 5)
    ]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize(("round_to", "factor"), [(2, 1.05), (4, 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_mrs_is_near_the_optimum_of_exhaustive_search(seed, round_to, factor):
    """Three groups in steps of 4 have few landings, far apart in loss, and local moves do not see all of them."""
    groups, cost = network([64, 48, 96], [(None, 0, 64, 9), (0, 1, 64, 9), (1, 2, 16, 9)], head=10)
    profile, scores, fractions = inputs(groups, seed)
    losses = losses_of(groups, profile, fractions)
    form, dense = cost.form("macs"), cost.macs({})
    plans = np.array(list(itertools.product(*[allowed_widths(g, round_to, 0.1).tolist() for g in groups])))
    loss = sum(values[plans[:, i]] for i, values in enumerate(losses))
    macs = form.constant + plans @ form.linear + np.einsum("pi,ij,pj->p", plans, form.quadratic, plans)
    for ratio in (0.3, 0.6, 0.85):
        budget = (1 - ratio) * dense
        keep = allocate("mrs", groups, cost, budget, "macs", profile, scores, fractions, round_to=round_to)
        best = loss[(macs <= budget) & (macs >= budget - 0.01 * dense)].min()
        found = sum(float(values[k]) for values, k in zip(losses, keep.values(), strict=True))
        assert abs(cost.macs(keep) - budget) <= 0.01 * dense
        assert found <= factor * best, (ratio, keep)


def parallel(costs):
    """Groups that do not touch each other, with one price a channel each."""
    linear = np.array(costs, dtype=float)
    form = QuadraticForm(0.0, linear, np.zeros((len(costs), len(costs))))
    groups = [ChannelGroup(f"g{i}", 64, ()) for i in range(len(costs))]
    return groups, CostModel(tuple(g.name for g in groups), np.full(len(costs), 64.0), {"macs": form})


def test_mrs_trades_loss_per_cost_not_loss():
    groups, cost = parallel([1.0, 16.0])
    fractions = equal_channels(groups)
    budget = 0.5 * cost.macs({})

    def keep(mrs):
        profile = profile_of(groups, mrs, [2, 2])
        return allocate("mrs", groups, cost, budget, "macs", profile, None, fractions, round_to=1)

    even = keep([1.0, 1.0])
    assert even["g0"] == 64 > even["g1"]  # equally sensitive: the dear group pays
    dear_but_sensitive = keep([1.0, 16.0])
    assert dear_but_sensitive["g0"] == pytest.approx(dear_but_sensitive["g1"], abs=1)  # equal loss per cost: equal cuts
    cheap_and_insensitive = keep([0.001, 16.0])
    assert cheap_and_insensitive["g0"] < dear_but_sensitive["g0"]


def test_kept_energy_grows_with_the_root_of_sensitivity_per_cost():
    """For a quadratic curve the loss is m x/(1-x), x the share cut, so the optimum keeps sqrt(m / cost)."""
    groups, cost = parallel([1.0, 1.0, 1.0])
    profile = profile_of(groups, [1.0, 4.0, 9.0], [2, 2, 2])
    keep = allocate("mrs", groups, cost, 60, "macs", profile, None, equal_channels(groups), round_to=1, min_keep=0)
    assert list(keep.values()) == [10, 20, 30]


def test_heavy_tails_do_not_empty_the_insensitive():
    """MRS of one ResNet-18 runs from 0.09 to 12.9; a raw min-max weight would leave nothing of most groups."""
    groups, cost = parallel([1.0] * 4)
    profile = profile_of(groups, [0.09, 0.2, 1.0, 12.9], [1.2] * 4)
    keep = allocate("mrs", groups, cost, 128, "macs", profile, None, equal_channels(groups), min_keep=0.0)
    assert list(keep.values()) == sorted(keep.values())
    assert min(keep.values()) >= 8 and max(keep.values()) <= 64


def test_losses_are_convex_and_vanish_at_full_width():
    groups, _ = NETWORKS["vgg16"]
    profile, _, fractions = inputs(groups)
    for group, loss in zip(groups, losses_of(groups, profile, fractions), strict=True):
        assert len(loss) == group.channels + 1 and loss[-1] == 0
        saved = loss[:-1] - loss[1:]
        assert (saved >= 0).all() and (np.diff(saved) <= 1e-6 * saved.max()).all()


def test_losses_follow_the_measured_curve():
    """A curve that is steeper than quadratic is taken as measured; dead channels cost nothing."""
    group = ChannelGroup("g0", 6, ())
    profile = profile_of([group], [0.5], [4.0])
    fraction = torch.tensor([0.0, 0.0, *RADII], dtype=torch.float64)
    loss = losses_of([group], profile, {"g0": fraction})[0][::-1]
    assert loss[1] == 0
    assert loss[2:] == pytest.approx(profile.groups[0].curve)


def test_rank_keeps_more_of_the_more_sensitive():
    groups, cost = parallel([1.0, 5.0, 2.0])
    profile = profile_of(groups, [0.1, 30.0, 2.0], [1, 1, 1])
    keep = allocate("rank", groups, cost, 0.5 * cost.macs({}), "macs", profile)
    assert keep["g0"] < keep["g2"] < keep["g1"]


def test_global_cuts_the_unimportant_and_insensitive():
    groups, cost = parallel([1.0, 1.0])
    ramp = torch.linspace(0.1, 1.9, 64)
    flat = torch.linspace(0.9, 1.1, 64)
    equal = profile_of(groups, [1.0, 1.0], [1, 1])
    keep = allocate("global", groups, cost, 100, "macs", equal, {"g0": ramp, "g1": flat})
    assert keep["g0"] < keep["g1"]
    sensitive = profile_of(groups, [9.0, 1.0], [1, 1])
    keep = allocate("global", groups, cost, 80, "macs", sensitive, {"g0": ramp, "g1": ramp})
    assert keep["g0"] > keep["g1"]


def test_floors_hold_and_an_impossible_budget_gives_the_floors():
    groups, cost = NETWORKS["vgg16"]
    for allocation in ALLOCATIONS.names:
        keep = allocate(allocation, groups, cost, 0.001 * cost.macs({}), "macs", *inputs(groups), min_keep=0.3)
        assert keep == {g.name: floor_of(g, 0.3) for g in groups}


def test_a_budget_above_the_dense_cost_keeps_everything():
    groups, cost = NETWORKS["vgg16"]
    for allocation in ALLOCATIONS.names:
        keep = allocate(allocation, groups, cost, 2 * cost.macs({}), "macs", *inputs(groups))
        assert keep == {g.name: g.channels for g in groups}


@pytest.mark.parametrize(
    ("channels", "blocks", "round_to", "levels"),
    [
        (64, 1, 8, [8, 16, 24, 32, 40, 48, 56, 64]),
        (16, 1, 8, [4, 8, 12, 16]),
        (24, 1, 8, [4, 8, 12, 16, 20, 24]),
        (36, 1, 8, [8, 16, 24, 32, 36]),
        (3, 1, 8, [1, 2, 3]),
        (128, 32, 8, [32, 64, 96, 128]),
        (12, 3, 8, [3, 6, 9, 12]),
        (10, 1, 1, list(range(1, 11))),
    ],
)
def test_levels(channels, blocks, round_to, levels):
    assert allowed_widths(ChannelGroup("g", channels, (), blocks), round_to, 0.1).tolist() == levels


def test_alignment_is_given_up_for_as_few_groups_as_possible():
    groups, cost = parallel([1.0, 1.0])
    keep = allocate(
        "uniform", groups, cost, 75, "macs", round_to=32
    )  # multiples of 16: 64 or 80 of 128, neither within 1.28
    assert sum(keep.values()) in (74, 75, 76)
    assert sum(k % 16 != 0 for k in keep.values()) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from([1, 4, 8, 16]))
def test_landing_respects_floors_blocks_and_budget(seed, ratio, round_to):
    rng = np.random.default_rng(seed)
    widths = [int(rng.integers(4, 40)) * 4 for _ in range(4)]
    layers = [(i - 1 if i else None, i, int(rng.integers(1, 100)), 9) for i in range(4)]
    plain, cost = network(widths, layers, head=10)
    groups = [ChannelGroup(g.name, g.channels, (), int(rng.choice([1, 1, 2, 4]))) for g in plain]
    dense = cost.macs({})
    losses = [rng.random() * np.linspace(1, 0, g.channels + 1) ** 2 for g in groups]
    wished = rng.random(4) * widths
    keep = round_to_budget(
        groups, wished, losses, cost.form("macs"), (1 - ratio) * dense, round_to=round_to, min_keep=0.1
    )
    assert all(k % g.blocks == 0 and floor_of(g, 0.1) <= k <= g.channels for g, k in zip(groups, keep, strict=True))
    after = cost.form("macs").value(keep.astype(float))
    coarsest = max(
        after - cost.form("macs").value(np.where(np.arange(4) == i, keep - g.blocks, keep).astype(float))
        for i, g in enumerate(groups)
    )
    assert abs(after - (1 - ratio) * dense) <= max(0.01 * dense, coarsest)


def test_what_is_missing_or_wrong_is_said():
    groups, cost = parallel([1.0, 1.0])
    profile = profile_of(groups, [1.0, 1.0], [1, 1])
    fractions = equal_channels(groups)
    with pytest.raises(
        UsageError,
        match=rf"pruning.allocation must be one of {', '.join(ALLOCATIONS.names)}, or file.py:function, got 'best'",
    ):
        allocate("best", groups, cost, 50)
    with pytest.raises(UsageError, match="'mrs' needs a sensitivity profile"):
        allocate("mrs", groups, cost, 50)
    with pytest.raises(UsageError, match="'mrs' needs the removed fractions"):
        allocate("mrs", groups, cost, 50, "macs", profile)
    with pytest.raises(UsageError, match="'global' needs channel scores"):
        allocate("global", groups, cost, 50, "macs", profile)
    with pytest.raises(UsageError, match="lack group 'g1'"):
        allocate("mrs", groups, cost, 50, "macs", profile_of(groups[:1], [1.0], [1]), None, fractions)
    with pytest.raises(UsageError, match="needs 65 removed fractions"):
        allocate("mrs", groups, cost, 50, "macs", profile, None, fractions | {"g1": torch.zeros(3)})
    with pytest.raises(UsageError, match=r"pruning.min_keep: input should be less than 1"):
        allocate("uniform", groups, cost, 50, min_keep=1.0)
    with pytest.raises(UsageError, match=r"pruning.round_to: input should be greater than or equal to 1"):
        allocate("uniform", groups, cost, 50, round_to=0)
    with pytest.raises(UsageError, match="not those that the cost model"):
        allocate("uniform", groups[:1], cost, 50)


def test_an_allocation_of_a_user_is_checked(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom robust_prune.budget.allocation import Wish\n"
        "def flat(problem):\n    return Wish(problem.dense / 2, np.zeros((len(problem.groups), 3)))\n"
        "def few(problem):\n    return Wish(problem.dense[:1])\n"
    )
    groups, cost = parallel([1.0, 1.0])
    with pytest.raises(UsageError, match=r"flat' must return losses \[channels \+ 1\] for each of 2 groups, got"):
        allocate(f"{tmp_path / 'mine.py'}:flat", groups, cost, 50)
    with pytest.raises(UsageError, match=r"few' must return 2 finite widths"):
        allocate(f"{tmp_path / 'mine.py'}:few", groups, cost, 50)
