"""Analysis of a model: all measurements that planning a cut requires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rich.console import RenderableType
from torch import Tensor

from ..data.base import random_images
from ..errors import UsageError
from ..ranking.importance import removed_fraction_curve
from ..sensitivity.display import render_table
from ..sensitivity.profile import SensitivityProfile
from ..shown import Shown
from ..structure.branches import Removable, find_branch
from ..structure.groups import GroupSearch
from .cost import CostModel, cost_model
from .cut_losses import CutLosses
from .measured import Measured

_BRANCH_IMAGES = 4


@dataclass(frozen=True, repr=False)
class Analysis(Shown):
    """Measurements of a model from which cuts are planned.

    Attributes:
        search: groups of channels that can be cut, and layers that cannot.
        cost: MACs, parameters and channels as a function of the kept channels.
        profile: MRS of modules and groups, which `analyse` always measures; None where a caller went without, which
            only the ``uniform`` allocation allows.
        scores: importance of each channel by group name, [channels]; higher is more important.
        removed: relative size of the weight perturbation by removing the k least important channels, by group name,
            [channels + 1]; None where a caller went without, which the ``mrs`` allocation does not allow.
        criterion: name of the criterion that made the scores; empty if unknown.
        cut_losses: losses of real cuts, which only the ``cuts`` allocation needs; else None.
        branches: groups that are residual branches and may be removed whole, by name.
    """

    search: GroupSearch
    cost: CostModel
    profile: SensitivityProfile | None
    scores: Mapping[str, Tensor]
    removed: Mapping[str, Tensor] | None = None
    criterion: str = ""
    cut_losses: CutLosses | None = None
    branches: Mapping[str, Removable] = field(default_factory=dict)

    def short(self) -> str:
        """Return one sentence: number of groups, MACs, and how MRS was measured."""
        whole = f", {len(self.search.skipped)} that stay whole" if self.search.skipped else ""
        measured = f"; MRS by {self.profile.estimator} on {self.profile.images:,} images" if self.profile else ""
        return f"{len(self.search.groups)} groups{whole}, {self.cost.macs({}) / 1e6:,.2f} M MACs{measured}"

    def table(self) -> RenderableType | None:
        """Return a table of MRS by module, or None if MRS was not measured."""
        return render_table(self.profile) if self.profile else None


def analyse(known: Measured, dense_widths: Mapping[str, int] | None = None) -> Analysis:
    """Find the groups of a model and measure its cost, MRS and channel scores.

    Args:
        known: measurements of the model, which are made where the cache lacks them; the model is moved to its device.
        dense_widths: channels of each group before earlier cuts, by name; minimum widths are a share of them.

    Raises:
        UsageError: the model has no group of channels that can be cut, or cannot be traced, measured or scored.
    """
    model, criterion, widths = known.model, known.recipe.pruning.criterion, dense_widths or {}
    search = known.groups()
    check_groups(search)
    search = replace(search, groups=tuple(replace(group, dense=widths.get(group.name)) for group in search.groups))
    cost = cost_model(model.cpu(), known.spec.blank_image(), search.groups)
    model.to(known.device)
    profile, scores = known.profile(search.groups), known.scores(search.groups)
    removed = {group.name: removed_fraction_curve(model, group, scores[group.name]) for group in search.groups}
    found = Analysis(search, cost, profile, scores, removed, criterion)
    return with_cut_losses(found, known) if known.recipe.pruning.allocation == "cuts" else found


def with_cut_losses(analysis: Analysis, known: Measured) -> Analysis:
    """Return the analysis with the branches that may be removed whole and the losses of real cuts.

    Args:
        analysis: result of `analyse` for the same model.
        known: measurements of the model, which stays on its device.

    Raises:
        UsageError: the model cannot be traced or measured.
    """
    model, recipe = known.model, known.recipe
    groups, branches = analysis.search.groups, dict[str, Removable]()
    place = next(model.parameters()).device
    if recipe.pruning.branches:
        model.cpu()
        few = random_images(known.images, _BRANCH_IMAGES, recipe.seed)[0].to(next(model.parameters()))
        branches = {g.name: b for g in groups if (b := find_branch(model, g, few))}
        cost = cost_model(model, known.spec.blank_image(), groups, branches)
        analysis = replace(analysis, cost=cost, branches=branches)
        model.to(place)
    return replace(analysis, cut_losses=known.cut_losses(groups, analysis.scores, branches))


def check_groups(search: GroupSearch) -> None:
    """Raise UsageError if `search` has no group."""
    if not search.groups:
        reason = f": {search.skipped[0].name}: {search.skipped[0].reason}" if search.skipped else ""
        raise UsageError(f"the model has no group of channels that can be cut{reason}")
