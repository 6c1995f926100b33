"""Evaluations on test images that commands share through the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..budget.counting import count_macs, count_params
from ..data.base import DataBundle, stratified
from ..introspect.fingerprint import images_hash, models_hash
from ..machine.device import choose_device
from ..models.artifact import Model
from ..models.user_file import versions
from ..recipe import Recipe
from ..runs.cache import Cache
from ..serialization import to_json
from .card import ResultCard
from .evaluate import Subject, evaluate
from .files import ExportedModel


@dataclass(frozen=True)
class Terms:
    """What models are evaluated on, and how.

    Attributes:
        data: data set, of whose test images ``evaluation.images`` are used.
        recipe: recipe with the threat model, the section ``evaluation``, the seed and the device.
        cache: results that commands share.
    """

    data: DataBundle
    recipe: Recipe
    cache: Cache


def evaluate_once(
    model: Model,
    name: str,
    terms: Terms,
    *,
    exported: Mapping[str, ExportedModel] | None = None,
    state_path: Path | None = None,
) -> ResultCard:
    """Return the card of a model on test images from the cache, or evaluate the model and store its card.

    Args:
        model: the model.
        name: its name on the card.
        terms: images, attacks and cache.
        exported: exported forms of the model by name.
        state_path: file for the progress of the evaluation, see `evaluate`.

    Raises:
        UsageError, QualityGateError: as `evaluate`.
    """
    recipe, exported = terms.recipe, exported or {}
    section, threat = recipe.evaluation, recipe.threat_model
    judged, device = stratified(terms.data.test, section.images), choose_device(recipe.device)
    subject = Subject(name, terms.data.name, "test")

    def make() -> ResultCard:
        return evaluate(
            model.module.to(device), judged, threat, section, subject=subject, seed=recipe.seed, exported=exported,
            state_path=state_path,
        )  # fmt: skip

    given = [
        models_hash(model.module), to_json(model.spec), images_hash(judged), to_json(threat),
        section.model_dump(mode="json"), versions(section.tier), to_json(subject), recipe.seed, device,
        [file.key for file in exported.values()],
    ]  # fmt: skip
    card = terms.cache.of_model(model.spec.arch).value(
        f"Evaluation of {name} by {section.tier}", ResultCard, given, make
    )
    macs = count_macs(model.module.cpu(), model.spec.blank_image())
    return replace(card, macs=macs, params=count_params(model.module))
