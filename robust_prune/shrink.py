"""From a dense robust model to a small recovered one: plan, cut, repair and fine-tune, in one step or in several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import stages
from .budget.counting import count_macs, count_params
from .budget.iterative import compose, dense_widths, realised, remaining_ratio
from .budget.latency import plan_for_latency
from .budget.plan import render_plan
from .budget.types import PruningPlan
from .console import console
from .evaluation.card import ResultCard
from .evaluation.hashing import models_hash
from .models import artifact
from .runs.files import digest, finite, write_json
from .runs.job import Job, StageLog, warn
from .sensitivity.profile import SensitivityProfile
from .structure.types import Refused


@dataclass(frozen=True)
class Shrunk:
    """The outcome.

    Attributes:
        model: as the artifact on disk holds it, on the CPU.
        plan: all cuts together, in channels of the dense model.
        profile: sensitivities of the dense model.
        rolled_back: groups that stayed whole in the last cut, and why.
        before_finetune: held-out accuracy after the last cut.
        history: one record an epoch of the last fine-tuning.
        recovery_seconds: training time of all fine-tunings together, scoring left out.
    """

    model: nn.Module
    plan: PruningPlan
    profile: SensitivityProfile
    rolled_back: tuple[Refused, ...]
    before_finetune: ResultCard
    history: tuple[dict[str, Any], ...]
    recovery_seconds: float


def make_plan(job: Job) -> PruningPlan:
    """Measures sensitivity and plans the (first) cut; nothing is written and the model stays as it is."""
    return _plan(job, job.loaded.model, ())[1]


def shrink(job: Job, log: StageLog, folder: Path) -> Shrunk:
    """Cuts and recovers as often as the recipe's ``pruning.steps`` says.

    Each cut is planned anew: adversarial set, sensitivities and scores are those of the model that the cut before it
    left, after a short recovery. Every step is a stage of the run, so that a killed run goes on at the last one.

    Args:
        job: what to do.
        log: of the run.
        folder: of the run.

    Raises:
        QualityGateError: surgery produced something that is not equal to the masked model.
    """
    steps = job.recipe.pruning.steps
    model: nn.Module = job.loaded.model
    plans, profiles, recovery = list[PruningPlan](), list[SensitivityProfile](), 0.0
    # The last step has the plain names, so that a run folder looks the same however many came before.
    for suffix in (*(f"-{step}" for step in range(1, steps)), ""):
        plan, profile = _planned(job, model, tuple(plans), log, f"plan{suffix}")
        console.print(render_plan(plan))
        warn(plan.note)
        profiles.append(profile)
        model, rolled_back, before, history = _step(job, model, plan, log, folder, suffix)
        recovery += sum(record["seconds"] for record in history)
        macs, params = count_macs(model, stages.blank_image(job.loaded.spec)), count_params(model)
        plans.append(realised(plan, {refused.name for refused in rolled_back}, macs, params))
    whole = compose(plans, job.recipe.pruning.ratio)
    return Shrunk(model, whole, profiles[0], rolled_back, before, history, recovery)


def _plan(job: Job, model: nn.Module, before: tuple[PruningPlan, ...]) -> tuple[SensitivityProfile, PruningPlan]:
    recipe, section = job.recipe, job.recipe.pruning
    analysis = stages.analyse(
        model, job.loaded.spec, job.data.train, recipe, stages.device_of(recipe), dense_widths(before)
    )
    if section.of == "latency":
        wanted = (1 - section.ratio) ** ((len(before) + 1) / section.steps)
        return analysis.profile, plan_for_latency(job, model, analysis, wanted)
    ratio = remaining_ratio(before, section.ratio, section.of, section.steps)
    return analysis.profile, stages.plan_cut(analysis, section.model_copy(update={"ratio": ratio}))


def _planned(
    job: Job, model: nn.Module, before: tuple[PruningPlan, ...], log: StageLog, name: str
) -> tuple[PruningPlan, SensitivityProfile]:
    def make() -> dict[str, Any]:
        profile, plan = _plan(job, model, before)
        return {"profile": profile.to_json(), "plan": plan.to_json()}

    stored = log.once(name, models_hash(model), make)
    return PruningPlan.from_json(stored["plan"]), SensitivityProfile.from_json(stored["profile"])


def _step(
    job: Job, parent: nn.Module, plan: PruningPlan, log: StageLog, folder: Path, suffix: str
) -> tuple[nn.Module, tuple[Refused, ...], ResultCard, tuple[dict[str, Any], ...]]:
    """Surgery, repair and fine-tuning; the model comes back as the artifact on disk holds it."""
    recipe, spec, threat = job.recipe, job.loaded.spec, stages.threat_of(job.recipe)
    device = stages.device_of(recipe)
    pruned, tuned = folder / f"prune{suffix}", folder / f"finetune{suffix}"
    cut_file, final_file = pruned / "model.safetensors", (tuned if suffix else folder) / "model.safetensors"
    settings = recipe.finetune
    if suffix:
        settings = settings.model_copy(update={"epochs": recipe.pruning.step_epochs})
    provenance = {
        "command": job.command, "parent": models_hash(job.loaded.model), "recipe": digest(recipe.model_dump()),
    }  # fmt: skip

    def make_cut() -> dict[str, Any]:
        console.print("Cutting channels and proving every group against the masked dense model")
        surgery = stages.cut(parent, plan, spec, job.data.train, recipe, device)
        card = stages.score_before_finetune(surgery.model, job.data, threat, recipe.evaluation, recipe.seed, device)
        artifact.save(cut_file, surgery.model.cpu(), spec, threat=threat, provenance=provenance)
        return {
            "rolled_back": [asdict(r) for r in surgery.rolled_back],
            "parity": surgery.parity,
            "before_finetune": card.to_json(),
        }

    def make_finetune() -> dict[str, Any]:
        model = artifact.load(cut_file, arch=job.arch, trust_source=True).model
        result = stages.finetune(
            model, job.data, threat, settings,
            seed=recipe.seed, device=device, checkpoint=tuned / "checkpoint.pt", teacher=job.loaded.model,
        )  # fmt: skip
        outcome: dict[str, Any] = finite(result.to_json())
        write_json(tuned / "history.json", outcome)
        artifact.save(final_file, model.cpu(), spec, threat=threat, provenance=provenance)
        return outcome

    done = log.once(f"prune{suffix}", plan.to_json(), make_cut, (cut_file,))
    recovered = log.once(f"finetune{suffix}", plan.to_json(), make_finetune, (final_file,), together=True)
    rolled_back = tuple(Refused(**r) for r in done["rolled_back"])
    for refused in rolled_back:
        warn(f"group {refused.name} stayed whole: {refused.reason}")
    warn(recovered["note"])
    small = artifact.load(final_file, arch=job.arch, trust_source=True).model
    return small, rolled_back, ResultCard.from_json(done["before_finetune"]), tuple(recovered["history"])
