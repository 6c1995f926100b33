"""Clean and robust accuracy: the figures, the points that decide them, and resumed runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.evaluation_sample import (
    THREAT,
    DiesAfter,
    KilledError,
    Tiny,
    evaluated,
    same_but_for_time,
)
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, frozen_eval
from robust_prune.attacks.objectives import cross_entropy
from robust_prune.data.base import TensorImages
from robust_prune.errors import QualityGateError, UsageError
from robust_prune.evaluation import evaluate as module
from robust_prune.evaluation import worst_case
from robust_prune.evaluation.card import ResultCard
from robust_prune.evaluation.flags import NOT_COPIED
from robust_prune.evaluation.scoring import check_points
from robust_prune.evaluation.state import load_state
from robust_prune.evaluation.worst_case import start_seed, worst_points
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.recipe import EvaluationSection
from robust_prune.serialization import from_json, to_json

# --- figures -----------------------------------------------------------------------------------------------------


def test_honest_model_has_clean_above_robust_and_no_flags(trained: Tiny, images: TensorImages) -> None:
    card = evaluated(trained, images, THREAT, steps=10, batch_size=64)
    assert card.clean.total == card.robust.total == 150
    assert card.clean.value > 0.7
    assert 0 < card.robust.correct < card.clean.correct
    assert card.flags == ()
    assert card.forwards > card.backwards > 0
    assert from_json(ResultCard, to_json(card)) == card


def test_linear_model_reaches_its_analytic_robust_accuracy() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, generator=generator)
    pixels = torch.randint(80, 176, (400, 3, 2, 2), generator=generator, dtype=torch.uint8)
    signed = (pixels.flatten(1).float() / 255 - 0.5) @ weight
    # Some labels are wrong on purpose, so that clean accuracy is below one.
    labels = (signed + 0.05 * torch.randn(400, generator=generator) > 0).long()

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x: Tensor) -> Tensor:
            value = (x.flatten(1) - 0.5) @ self.weight
            return torch.stack([-value, value], dim=1)

    threat = ThreatModel("linf", 8 / 255)
    margin = torch.where(labels == 1, signed, -signed)
    card = evaluated(Linear().eval(), TensorImages(pixels, labels), threat, restarts=1)
    assert card.clean.correct == int((margin > 0).sum())
    assert card.robust.correct == int((margin > threat.epsilon * weight.abs().sum()).sum())
    assert 0 < card.robust.correct < card.clean.correct < 400


def test_linear_model_reaches_its_analytic_l2_robust_accuracy() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(12, generator=generator)
    pixels = torch.randint(80, 176, (300, 3, 2, 2), generator=generator, dtype=torch.uint8)
    signed = (pixels.flatten(1).float() / 255 - 0.5) @ weight
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]))
        model[1].bias.copy_(torch.tensor([0.5, -0.5]) * weight.sum())
    threat = ThreatModel("l2", 0.1)
    card = evaluated(model, TensorImages(pixels, (signed > 0).long()), threat, restarts=2)
    exact = int((signed.abs() > 0.1 * weight.norm()).sum())
    assert exact < card.clean.correct == 300
    # The attack walks the sphere towards the worst point without landing on it exactly.
    assert exact <= card.robust.correct <= exact + 3


def test_epsilon_zero_gives_the_clean_accuracy(trained: Tiny, images: TensorImages) -> None:
    card = evaluated(trained, images, ThreatModel("linf", 0.0))
    assert card.robust == card.clean
    assert (card.forwards, card.backwards) == (0, 0)


def test_an_attack_with_no_room_is_named_so(trained: Tiny, images: TensorImages) -> None:
    assert evaluated(trained, images, ThreatModel("linf", 0.0)).attack == "none: epsilon is 0"
    bf16 = evaluated(trained, images, THREAT, steps=1, precision="bf16").attack
    assert bf16 == "PGD-1, 2 random restarts, margin and cross-entropy, fp32 verdict, bf16 gradients, an upper bound"


@pytest.mark.parametrize("fast", [True, False])
def test_gradients_are_bf16_where_the_hardware_is_fast_at_it(
    trained: Tiny, images: TensorImages, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(module, "runs_in_bf16", lambda model, images: fast)
    assert ("bf16 gradients" in evaluated(trained, images, THREAT, steps=1, precision="auto").attack) == fast


def seen_by(model: nn.Module, images: TensorImages, **options: Any) -> list[Tensor]:
    """All batches that an evaluation puts through the model."""
    batches: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, given: batches.append(given[0].detach()))
    try:
        settings = EvaluationSection(steps=1, restarts=1, precision="fp32")
        module.evaluate(model, images, THREAT, settings, **options)
    finally:
        hook.remove()
    return batches


def test_random_starts_follow_the_seed(trained: Tiny, images: TensorImages) -> None:
    one, again, other = (seen_by(trained, images, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    attacked = [len(batch) == len(other[i]) and not torch.equal(batch, other[i]) for i, batch in enumerate(one)]
    assert any(attacked) and torch.equal(one[0], other[0])


def test_images_come_in_the_layout_that_the_model_is_fastest_in(trained: Tiny, images: TensorImages) -> None:
    class Viewing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return trained(x.view(len(x), -1).view_as(x))

    for model, layout in ((trained, torch.channels_last), (Viewing(), torch.contiguous_format)):
        whole = [batch for batch in seen_by(model, images) if len(batch) == len(images)]
        assert whole and all(batch.is_contiguous(memory_format=layout) for batch in whole)


def test_more_restarts_never_help_the_model(trained: Tiny, images: TensorImages) -> None:
    cards = [evaluated(trained, images, THREAT, steps=2, restarts=r) for r in (1, 2, 4)]
    counts = [card.robust.correct for card in cards]
    assert counts == sorted(counts, reverse=True)


def test_bf16_gradients_end_in_fp32_verdicts(trained: Tiny, images: TensorImages) -> None:
    fp32 = evaluated(trained, images, THREAT, steps=5)
    bf16 = evaluated(trained, images, THREAT, steps=5, precision="bf16")
    assert bf16.clean == fp32.clean
    assert abs(bf16.robust.correct - fp32.robust.correct) <= 8
    assert "bf16" in bf16.attack and bf16.flags == ()


# --- the points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [THREAT, ThreatModel("l2", 0.7)], ids=str)
def test_worst_points_lie_in_the_ball_and_decide(trained: Tiny, images: TensorImages, threat: ThreatModel) -> None:
    x, y = images.images.float() / 255, images.labels
    with frozen_eval(trained):
        kept = trained(x).argmax(1) == y
        x, y = x[kept], y[kept]
        survives, worst, _ = worst_points(trained, x, y, threat, steps=10, restarts=2, seed=0)
        assert torch.equal(trained(worst).argmax(1) == y, survives)
    check_points(worst, x, threat)
    assert not torch.equal(worst, x)


def test_points_outside_the_ball_are_refused(
    monkeypatch: pytest.MonkeyPatch, trained: Tiny, images: TensorImages
) -> None:
    def cheating(model: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return (x + 2 * THREAT.epsilon).clamp(0, 1)

    monkeypatch.setattr(worst_case, "pgd", cheating)
    with pytest.raises(QualityGateError, match="outside Linf 8/255"):
        evaluated(trained, images, THREAT)
    x = torch.full((1, 3, 2, 2), 0.99)
    with pytest.raises(QualityGateError, match=r"leaves \[0, 1\]"):
        check_points(x + 0.02, x, THREAT)
    with pytest.raises(QualityGateError, match="broken"):
        check_points(x * float("nan"), x, THREAT)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [130, 150, 200])
def test_a_killed_run_resumes_to_the_same_card(trained: Tiny, images: TensorImages, tmp_path: Path, calls: int) -> None:
    state = tmp_path / "deep" / "state.npz"
    model = DiesAfter(trained).eval()
    whole = evaluated(model, images, THREAT, steps=5, batch_size=32)
    model.calls[0] = calls
    with pytest.raises(KilledError):
        evaluated(model, images, THREAT, steps=5, batch_size=32, state_path=state)
    assert all(p.requires_grad for p in trained.parameters())
    model.calls[0] = 10**9
    resumed = evaluated(model, images, THREAT, steps=5, batch_size=32, state_path=state)
    assert same_but_for_time(whole, resumed)
    spent = 10**9 - model.calls[0]
    model.calls[0] = 10**9
    evaluated(model, images, THREAT, steps=5, batch_size=32)
    assert spent < 10**9 - model.calls[0], "nothing of the killed run was reused"
    assert sorted(p.name for p in state.parent.iterdir()) == ["state.npz"]


def test_a_finished_state_answers_without_running_the_model(
    trained: Tiny, images: TensorImages, tmp_path: Path
) -> None:
    state = tmp_path / "state.npz"
    model = DiesAfter(trained).eval()
    first = evaluated(model, images, THREAT, steps=3, state_path=state)
    model.calls[0] = 0
    assert evaluated(model, images, THREAT, steps=3, state_path=state) == first


@pytest.mark.parametrize("damage", [b"", b"not a zip", "truncate", "wrong shape"])
def test_a_damaged_state_is_started_over(
    trained: Tiny, images: TensorImages, tmp_path: Path, damage: bytes | str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.npz"
    first = evaluated(trained, images, THREAT, steps=3, state_path=state)
    if isinstance(damage, bytes):
        state.write_bytes(damage)
    elif damage == "truncate":
        state.write_bytes(state.read_bytes()[:-40])
    else:
        with np.load(state) as stored:
            arrays = dict(stored)
        arrays["clean"] = arrays["clean"][:-1]
        np.savez(state, **arrays)
    again = evaluated(trained, images, THREAT, steps=3, state_path=state)
    assert same_but_for_time(first, again)
    assert "starts over" in capsys.readouterr().out.replace("\n", " ")


def test_state_of_other_settings_or_models_is_not_reused(trained: Tiny, images: TensorImages, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    evaluated(trained, images, THREAT, steps=1, restarts=1, state_path=state)
    first = state.read_bytes()
    stored = evaluated(trained, images, THREAT, steps=8, state_path=state)
    assert same_but_for_time(stored, evaluated(trained, images, THREAT, steps=8))
    _, note = load_state(state, "another key", 150)
    assert "another model or other settings" in note
    (aside,) = tmp_path.glob("state.npz.*.old")
    assert aside.read_bytes() == first


def test_progress_survives_a_command_with_other_settings(
    trained: Tiny, images: TensorImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, model = tmp_path / "state.npz", DiesAfter(trained).eval()
    whole = evaluated(model, images, THREAT, steps=5, batch_size=32)
    model.calls[0] = 200
    with pytest.raises(KilledError):
        evaluated(model, images, THREAT, steps=5, batch_size=32, state_path=state)
    begun = state.read_bytes()
    model.calls[0] = 10**9
    for steps in (1, 2):  # twice, since the second must not take the place of the first
        evaluated(model, images, THREAT, steps=steps, batch_size=32, state_path=state)
    assert begun in [path.read_bytes() for path in tmp_path.glob("*.old")]
    model.calls[0] = 10**9
    assert same_but_for_time(whole, evaluated(model, images, THREAT, steps=5, batch_size=32, state_path=state))
    spent = 10**9 - model.calls[0]
    model.calls[0] = 10**9
    evaluated(model, images, THREAT, steps=5, batch_size=32)
    assert spent < 10**9 - model.calls[0] and "the evaluation goes on from it" in capsys.readouterr().out


def test_no_changed_bit_of_a_state_is_used_or_ends_in_a_traceback(
    trained: Tiny, images: TensorImages, tmp_path: Path
) -> None:
    state = tmp_path / "state.npz"
    evaluated(trained, images, THREAT, steps=1, restarts=1, state_path=state)
    whole, numbers = state.read_bytes(), np.random.default_rng(0)
    with np.load(state) as stored:
        key = json.loads(stored["head"].tobytes())["key"]
        arrays = {name: np.array(stored[name]) for name in stored.files}
    first, _ = load_state(state, key, len(images))
    for bit in numbers.integers(0, 8 * len(whole), 400).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        state.write_bytes(changed)
        found, note = load_state(state, key, len(images))
        assert "starts over" in note or (found.counters == first.counters and (found.robust == first.robust).all())
    for change in ({"robust": np.ones_like(arrays["robust"])}, {"head": np.frombuffer(b"5", np.uint8)}):
        np.savez(state, **(arrays | change))
        assert "starts over" in load_state(state, key, len(images))[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"threat": ThreatModel("l2", 0.1)}, {"steps": 2}, {"restarts": 2}, {"sweep": (0.1,)},
        {"batch_size": 32}, {"precision": "bf16"}, {"tier": "apgd"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_whatever_changes_the_figures_changes_the_key_of_the_state(
    trained: Tiny, images: TensorImages, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_of(seed: int = 0, threat: ThreatModel = THREAT, **section: Any) -> str:
        keys: list[str] = []

        def stop(path: Path, key: str, *_: int) -> None:
            keys.append(key)
            raise KilledError

        monkeypatch.setattr(module, "load_state", stop)
        settings = EvaluationSection(**{"steps": 1, "restarts": 1, "precision": "fp32", **section})
        with pytest.raises(KilledError):
            module.evaluate(trained, images, threat, settings, seed=seed, state_path=tmp_path / "state.npz")
        return keys[0]

    assert key_of() == key_of() != key_of(**changes)
    present = key_of()
    with monkeypatch.context() as other_attack:
        other_attack.setattr(worst_case, "PGD_OBJECTIVES", (cross_entropy,))
        assert key_of() != present
    tier = tmp_path / "tier.py"
    tier.write_text("from robust_prune.evaluation.stages import PGD\ndef mine(classes):\n    return (PGD,)\n")
    before = key_of(tier=f"{tier}:mine")
    tier.write_text(tier.read_text() + "# changed\n")
    assert key_of(tier=f"{tier}:mine") != before


def test_model_hash_sees_weights_buffers_and_structure_but_not_mode(trained: Tiny) -> None:
    base = models_hash(trained)
    trained.train()
    assert models_hash(trained) == base
    trained.eval()
    other = Tiny()
    other.load_state_dict(trained.state_dict())
    assert models_hash(other) == base
    other.features[1].running_mean[0] += 1
    assert models_hash(other) != base
    assert models_hash(nn.Conv2d(3, 4, 3, stride=1, bias=False)) != models_hash(
        nn.Conv2d(3, 4, 3, stride=2, bias=False)
    )


def test_a_model_that_cannot_be_copied_is_attacked_all_the_same(trained: Tiny, images: TensorImages) -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lock = trained, threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    card = evaluated(Locked().eval(), images, THREAT, steps=3)
    assert card.robust == evaluated(trained, images, THREAT, steps=3).robust
    assert card.flags == (NOT_COPIED,)


def test_start_seeds_differ_everywhere() -> None:
    seeds = {start_seed(s, b, r) for s in range(3) for b in (0, 1, 256) for r in range(3)}
    assert len(seeds) == 27
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("wrong", [-1, 99])
def test_a_label_that_the_model_lacks_is_named_wherever_it_is(
    trained: nn.Module, images: TensorImages, wrong: int
) -> None:
    labels = images.labels.clone()
    labels[-1] = wrong
    with pytest.raises(UsageError, match=f"label {wrong} found, but the model has"):
        evaluated(trained, TensorImages(images.images, labels), THREAT, steps=1, batch_size=32)
