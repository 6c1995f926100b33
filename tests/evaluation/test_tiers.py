"""Tiers above PGD: what they run, what they find, and that a kill changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.evaluation_sample import (
    CLASSES,
    THREAT,
    DiesAfter,
    KilledError,
    Mirrored,
    Tiny,
    evaluated,
    generated,
    same_but_for_time,
)
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.catalogue import TIERS
from robust_prune.data.base import TensorImages
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.evaluation.card import ResultCard
from robust_prune.evaluation.flags import black_box_flags, gap_flags, sweep_flags
from robust_prune.evaluation.stages import attack_line, stages_of
from robust_prune.serialization import from_json, to_json

QUICK = {"steps": 5, "restarts": 1}


class FourClasses(nn.Module):
    """With a class that is never chosen, since the standard wants four."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.cat([logits, logits.amin(1, keepdim=True) - 1], dim=1)


# --- figures -----------------------------------------------------------------------------------------------------


def test_each_tier_is_at_least_as_strong_as_the_one_below(trained: Tiny, images: TensorImages) -> None:
    model = FourClasses(trained).eval()
    cards = {
        tier: evaluated(model, images, THREAT, **QUICK, tier=tier, batch_size=100)
        for tier in ("pgd", "apgd", "aa-fast", "standard")
    }
    robust = {tier: card.robust.correct for tier, card in cards.items()}
    assert robust["pgd"] >= robust["apgd"] >= robust["aa-fast"] > 0
    assert abs(robust["aa-fast"] - robust["standard"]) <= 1
    assert list(cards["pgd"].breakdown) == ["pgd"]
    assert list(cards["apgd"].breakdown) == list(cards["aa-fast"].breakdown) == ["pgd", "apgd-ce", "apgd-t", "square"]
    assert list(cards["standard"].breakdown) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for tier, card in cards.items():
        left = list(card.breakdown.values())
        assert left == sorted(left, reverse=True) and left[-1] == card.robust.correct
        assert card.tier == tier and card.flags == () and "fp32 verdict" in card.attack
        assert from_json(ResultCard, to_json(card)) == card
    assert cards["apgd"].attack == ("PGD-5, 1 random restart, margin; APGD-CE-100; APGD-T-100, 3 targets, fp32 verdict")


def test_classes_add_up(trained: Tiny, images: TensorImages) -> None:
    card = evaluated(trained, images, THREAT, **QUICK, batch_size=64)
    assert [part.label for part in card.per_class] == [0, 1, 2]
    assert [part.total for part in card.per_class] == [50, 50, 50]
    assert sum(part.clean for part in card.per_class) == card.clean.correct
    assert sum(part.robust for part in card.per_class) == card.robust.correct
    with torch.no_grad():
        right = trained(images.images.float() / 255).argmax(1) == images.labels
    assert card.per_class[1].clean == int(right[images.labels == 1].sum())


def test_other_radii_are_swept(trained: Tiny, images: TensorImages) -> None:
    radii = (0.0, 4 / 255, THREAT.epsilon, 0.25)
    card = evaluated(trained, images, THREAT, steps=10, restarts=1, sweep=radii, batch_size=256)
    found = dict(card.sweep)
    assert list(found) == sorted(found) and len(found) == 4
    values = [accuracy.correct for accuracy in found.values()]
    assert values[0] == card.clean.correct and values[2] == card.robust.correct and values[3] == 0
    assert values == sorted(values, reverse=True) and card.flags == ()
    with pytest.raises(UsageError, match=r"sweep\.0: input should be greater than or equal to 0, got -0\.1"):
        evaluated(trained, images, THREAT, sweep=(-0.1,))


def test_epsilon_zero_runs_no_attack(trained: Tiny, images: TensorImages) -> None:
    card = evaluated(trained, images, ThreatModel("linf", 0.0), tier="aa-fast")
    assert card.robust == card.clean and card.breakdown == {} and card.backwards == 0


# --- kills -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["aa-fast", "standard"])
def test_a_killed_run_resumes_to_the_same_card(
    trained: Tiny, tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = generated(24, seed=1)
    monkeypatch.setattr("robust_prune.evaluation.worst_case.APGD_STEPS", 20)
    monkeypatch.setattr("robust_prune.evaluation.passes.BLACK_BOX_QUERIES", 60)
    if tier == "standard":
        monkeypatch.setattr("robust_prune.evaluation.autoattack.ATTACKS", ("apgd-ce", "apgd-t"))
    model = DiesAfter(FourClasses(trained)).eval()
    run = {**QUICK, "tier": tier, "batch_size": 10, "sweep": (0.01, 0.02)}
    whole = evaluated(model, images, THREAT, **run)
    spent = 10**9 - model.calls[0]
    state = tmp_path / "state.npz"
    for part in (0.3, 0.25, 0.25):
        model.calls[0] = int(part * spent)
        with pytest.raises(KilledError):
            evaluated(model, images, THREAT, **run, state_path=state)
    model.calls[0] = 10**9
    resumed = evaluated(model, images, THREAT, **run, state_path=state)
    assert same_but_for_time(whole, resumed)
    assert 10**9 - model.calls[0] < spent, "nothing of the killed runs was reused"


# --- alarms ------------------------------------------------------------------------------------------------------


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Misleading(nn.Module):
    """Its gradient has the wrong sign."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(Flip.apply(x))


class Quantised(Misleading):
    """Sixteen levels of grey: almost everywhere flat."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 15).round() / 15)


class Batched(Misleading):
    """Normalises by the statistics of the batch that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x - x.mean((0, 2, 3), keepdim=True) + 0.45)


@pytest.mark.parametrize(
    ("cheat", "sentences"),
    [
        (Misleading, ["cosine with finite differences is -1.00", "black-box attack broke", "survive PGD at Linf 0.5"]),
        (Quantised, ["cosine with finite differences is 0.00", "black-box attack broke", "survive PGD at Linf 0.5"]),
        (Batched, ["depend on the batch"]),
    ],
)
def test_models_built_to_cheat_ring_the_alarms(
    trained: Tiny, images: TensorImages, cheat: type[Misleading], sentences: list[str]
) -> None:
    honest = evaluated(trained, images, THREAT, **QUICK, tier="apgd", batch_size=150)
    card = evaluated(cheat(trained).eval(), images, THREAT, **QUICK, tier="apgd", batch_size=150)
    assert honest.flags == ()
    for sentence in sentences:
        assert any(sentence in flag for flag in card.flags), card.flags


def test_limits_of_the_alarms() -> None:
    assert gap_flags(480, 400, 1000) == [] and "8.1 points" in gap_flags(481, 400, 1000)[0]
    assert gap_flags(146, 100, 299) == [], "a few images are not a gap"
    assert black_box_flags("the model", 64, 1) == [] and "2 of 64" in black_box_flags("the model", 64, 2)[0]
    assert sweep_flags({0.02: 0.4, 0.01: 0.391, 0.03: 0.2}) == []
    assert "rises by 2.0 points from radius 0.01 to 0.02" in sweep_flags({0.02: 0.41, 0.01: 0.39})[0]


def test_an_exported_file_is_attacked_directly_as_well(
    trained: Tiny, images: TensorImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {**QUICK, "tier": "apgd", "exported": {"fp32": Mirrored(trained)}}
    attacked = evaluated(trained, images, THREAT, **run)
    monkeypatch.setattr("robust_prune.evaluation.passes.BLACK_BOX_QUERIES", 1)
    spared = evaluated(trained, images, THREAT, **run)
    assert attacked.exported["fp32"].robust.correct < spared.exported["fp32"].robust.correct
    assert attacked.robust == spared.robust


# --- requests ----------------------------------------------------------------------------------------------------


def test_the_standard_wants_four_classes_and_its_package(
    trained: Tiny, images: TensorImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"at least 4 classes, the model has {CLASSES}"):
        evaluated(trained, images, THREAT, tier="standard")
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(EnvironmentProblem, match="pip install pyautoattack"):
        evaluated(FourClasses(trained).eval(), images, THREAT, tier="standard")


def test_the_standard_leaves_the_global_random_numbers_alone(trained: Tiny) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)
    evaluated(FourClasses(trained).eval(), generated(6, seed=1), THREAT, tier="standard", **QUICK)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


@pytest.mark.parametrize("tier", TIERS.names)
def test_every_tier_says_what_it_runs(tier: str) -> None:
    stages = stages_of(tier, 10)
    assert TIERS.choices[tier] and len(stages_of(tier, 4)) <= len(stages)
    line = attack_line(stages, 20, 2, 10)
    assert ", fp32 verdict" in line and ("PGD-20" in line or "AutoAttack" in line)
    assert line.endswith("an upper bound") == (tier in ("pgd", "apgd"))
    assert not attack_line(stages_of("apgd", 4), 20, 2, 4).endswith("an upper bound"), "three targets are all there are"


def test_there_are_no_more_targets_than_other_classes() -> None:
    assert [stage.rank for stage in stages_of("aa-fast", 5) if stage.kind == "apgd-t"] == [1, 2, 3, 4]
    assert [stage.rank for stage in stages_of("apgd", 10) if stage.kind == "apgd-t"] == [1, 2, 3]


def test_a_stage_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    tier = tmp_path / "tier.py"
    tier.write_text(
        "from robust_prune.evaluation.stages import Stage\n\ndef mine(classes):\n    return (Stage('x', 'cw'),)\n"
    )
    with pytest.raises(UsageError, match=r"unknown kind 'cw'\. Known kinds: pgd, apgd-ce"):
        stages_of(f"{tier}:mine", 10)
