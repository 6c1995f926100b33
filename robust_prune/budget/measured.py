"""What is measured of a model for planning; each part is stored, so that no run measures it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..console import working
from ..data.base import ImageSet, random_images
from ..introspect.fingerprint import images_hash, models_hash
from ..models import user_file
from ..models.spec import ModelSpec
from ..ranking.importance import channel_scores
from ..recipe import Recipe
from ..runs.cache import Cache
from ..runs.parts import parts
from ..sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from ..sensitivity.aggregation import aggregate_groups
from ..sensitivity.estimators import measure
from ..sensitivity.profile import SensitivityProfile
from ..serialization import to_json
from ..structure.branches import Removable
from ..structure.groups import GroupSearch, find_groups
from ..structure.paths import sample_images
from ..structure.types import ChannelGroup
from .cut_losses import CutLoss, CutLosses, measure_cuts


@dataclass(frozen=True)
class Measured:
    """Measurements of a model on training images, taken from the cache where they are known.

    Attributes:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; measuring moves it to `device`, or to the CPU for
            `groups`.
        spec: specification of the model, with the size of its images.
        images: training images that are not used for model selection; never test images.
        recipe: recipe with threat model, seed and the sections ``sensitivity`` and ``pruning``.
        device: ``cpu`` or ``cuda``.
        cache: where results are stored.
    """

    model: nn.Module
    spec: ModelSpec
    images: ImageSet
    recipe: Recipe
    device: str
    cache: Cache = field(default_factory=Cache)
    _sets: dict[int, AdversarialSet] = field(default_factory=dict, repr=False)

    @cached_property
    def _identity(self) -> list[Any]:
        """JSON values that identify model, images and seed; none are needed where nothing is stored."""
        if self.cache.folder is None:
            return []
        return [models_hash(self.model), to_json(self.spec), images_hash(self.images), self.recipe.seed, self.device]

    def groups(self) -> GroupSearch:
        """Return the groups of channels that can be cut, each proved by a trial cut.

        Raises:
            UsageError: the model does not run or cannot be traced.
        """

        def make() -> GroupSearch:
            with working("Finding groups of channels and proving each by a trial cut"):
                seen = sample_images(self.images, self.recipe.seed)
                return find_groups(self.model.cpu(), self.spec.blank_image(), seen)

        return self.cache.value("Groups of channels", GroupSearch, self._identity, make)

    def attacked(self, count: int | None = None) -> AdversarialSet:
        """Return the adversarial set.

        Args:
            count: number of images, by default that of the section ``sensitivity``.

        Raises:
            UsageError: there are no training images.
        """
        recipe, threat = self.recipe, self.recipe.threat_model
        count = count or recipe.sensitivity.images
        if count in self._sets:
            return self._sets[count]
        section = recipe.sensitivity.model_copy(update={"images": count})

        def make() -> dict[str, Tensor]:
            made = make_adversarial_set(
                self.model.to(self.device), self.images, threat, section, seed=recipe.seed, device=self.device
            )
            return {"images": made.images, "labels": made.labels}

        found = self.cache.tensors("Adversarial set", [*self._identity, to_json(threat), count, section.steps], make)
        self._sets[count] = AdversarialSet(found["images"], found["labels"], threat, recipe.seed)
        return self._sets[count]

    def profile(self, groups: Sequence[ChannelGroup]) -> SensitivityProfile:
        """Return the MRS of all modules and groups.

        Raises:
            UsageError: the model has no layer that can be measured, or a loss is not finite.
        """
        section = self.recipe.sensitivity
        given = [*self._identity, to_json(self.recipe.threat_model), section.model_dump(mode="json")]

        def make() -> SensitivityProfile:
            attacked = self.attacked()
            with parts(self.cache, "Sensitivity", given) as found:
                return measure(self.model.to(self.device), attacked, section, device=self.device, parts=found)

        found = self.cache.value("Sensitivity", SensitivityProfile, given, make)
        return aggregate_groups(found, groups, section.aggregation)

    def scores(self, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        """Return the importance of each channel by group name, [channels].

        Raises:
            UsageError: as `channel_scores`.
        """
        recipe, criterion, count = self.recipe, self.recipe.pruning.criterion, self.recipe.sensitivity.images
        threat, steps = to_json(recipe.threat_model), recipe.sensitivity.steps
        given = [*self._identity, threat, count, steps, criterion, user_file.versions(criterion)]

        def make() -> dict[str, Tensor]:
            return channel_scores(
                self.model.to(self.device), groups, criterion,
                adv=self.attacked(), clean=random_images(self.images, count, recipe.seed), seed=recipe.seed,
                device=self.device,
            )  # fmt: skip

        return self.cache.tensors("Channel scores", given, make)

    def cut_losses(
        self, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], branches: Mapping[str, Removable]
    ) -> CutLosses:
        """Return the losses of real cuts of each group, and of taking each of the branches out.

        Raises:
            UsageError: a loss is not finite.
        """
        recipe, criterion = self.recipe, self.recipe.pruning.criterion
        threat = recipe.threat_model
        given = [*self._identity, to_json(threat), criterion, user_file.versions(criterion), sorted(branches)]
        given += [recipe.sensitivity.images, recipe.sensitivity.steps]

        def make() -> dict[str, tuple[CutLoss, ...]]:
            return measure_cuts(self.model, self.images, groups, scores, branches, threat, seed=recipe.seed)

        return self.cache.value("Losses of real cuts", dict[str, tuple[CutLoss, ...]], given, make)
