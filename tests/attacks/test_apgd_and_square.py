"""APGD and Square: their properties, and their strength beside the standard's own."""

from __future__ import annotations

import pytest
import torch
from builders.evaluation_sample import CLASSES, THREAT, DiesAfter, KilledError, Tiny, generated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, apgd, frozen_eval, n_fgsm, pgd, square
from robust_prune.attacks.objectives import cross_entropy, dlr, margin, misclassified, targeted_dlr
from robust_prune.errors import UsageError
from robust_prune.evaluation.scoring import check_points

L2 = ThreatModel("l2", 0.5)


@pytest.fixture(scope="module")
def right(trained: Tiny) -> tuple[Tensor, Tensor]:
    """Images that the model has right."""
    images = generated(300, seed=1)
    x, y = images.images.float() / 255, images.labels
    with torch.no_grad():
        keep = trained(x).argmax(1) == y
    return x[keep], y[keep]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def standing(model: nn.Module, points: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(points).argmax(1) == y).sum())


# --- losses ------------------------------------------------------------------------------------------------------


def test_margin_and_dlr_say_when_an_image_is_lost() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [1.0, 3.0, 0.0, -1.0]])
    y = torch.tensor([0, 0])
    assert margin(logits, y).tolist() == [-2, 2]
    assert misclassified(logits, y).tolist() == [False, True]
    assert dlr(logits, y).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert targeted_dlr(logits, y, torch.tensor([2, 2])).tolist() == pytest.approx([-3 / 3.5, -1 / 3.5])
    for scale, shift in ((1e4, 0.0), (1e-3, 5.0)):
        assert torch.allclose(dlr(logits * scale + shift, y), dlr(logits, y), rtol=1e-3)


def test_logits_that_are_not_finite_are_lost() -> None:
    logits = torch.tensor([[torch.inf, 0.0, 0.0], [2.0, torch.nan, 0.0], [2.0, 1.0, 0.0]])
    assert misclassified(logits, torch.zeros(3, dtype=torch.long)).tolist() == [True, True, False]


# --- properties --------------------------------------------------------------------------------------------------

ATTACKS = {
    "pgd": lambda m, x, y, t: pgd(m, x, y, t, steps=4, generator=seeded()),
    "apgd-ce": lambda m, x, y, t: apgd(m, x, y, t, steps=8, generator=seeded()),
    "apgd-dlr": lambda m, x, y, t: apgd(m, x, y, t, loss="dlr", steps=8, restarts=2, generator=seeded()),
    "apgd-t": lambda m, x, y, t: apgd(m, x, y, t, loss="dlr", target=(y + 1) % CLASSES, steps=8, generator=seeded()),
    "square": lambda m, x, y, t: square(m, x, y, t, queries=12, generator=seeded()),
}


@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=12, deadline=None)
@given(
    threat=st.one_of(
        st.builds(ThreatModel, st.just("linf"), st.one_of(st.just(0.0), st.floats(1e-4, 1.0))),
        st.builds(ThreatModel, st.just("l2"), st.one_of(st.just(0.0), st.floats(1e-4, 3.0))),
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    count=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    black=st.booleans(),
)
def test_points_stay_in_the_ball_and_never_do_worse_than_the_start(
    name: str, threat: ThreatModel, dtype: torch.dtype, count: int, seed: int, black: bool
) -> None:
    torch.manual_seed(seed)
    model = Tiny().to(dtype).eval()
    x = torch.zeros(count, 3, 8, 8, dtype=dtype) if black else torch.rand(count, 3, 8, 8, dtype=dtype)
    y = torch.randint(0, CLASSES, (count,))
    kept = x.clone()
    with frozen_eval(model):
        points = ATTACKS[name](model, x, y, threat)
        again = ATTACKS[name](model, x, y, threat)
    check_points(points, x, threat)
    assert points.shape == x.shape and points.dtype == dtype and torch.equal(points, again)
    assert torch.equal(x, kept) and not points.requires_grad


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_ends_above_its_start(trained: Tiny, right: tuple[Tensor, Tensor], threat: ThreatModel, loss: str) -> None:
    x, y = right
    value = {"ce": cross_entropy, "dlr": dlr}[loss]
    with frozen_eval(trained), torch.no_grad():
        points = [apgd(trained, x, y, threat, loss=loss, steps=steps, generator=seeded()) for steps in (1, 40)]
        losses = [value(trained(p), y) for p in (x, *points)]
        held = [~misclassified(trained(p), y) for p in points]
    both = held[0] & held[1]  # a misclassified image leaves at once, whatever its loss
    assert both.sum() > 20
    assert (losses[2] >= losses[1])[both].all()
    assert (losses[2] > losses[0])[both].float().mean() > 0.95
    assert held[1].sum() < held[0].sum()


@pytest.mark.parametrize("name", [*ATTACKS, "n_fgsm"])
def test_the_model_is_as_it_was_even_when_interrupted(trained: Tiny, right: tuple[Tensor, Tensor], name: str) -> None:
    x, y = right
    attack = {**ATTACKS, "n_fgsm": n_fgsm}[name]
    model = DiesAfter(trained).eval()
    trained.features[1].train()  # one odd mode that has to come back
    trained.zero_grad()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    trained.head.bias.requires_grad_(False)
    try:
        for calls in (10**9, 0 if name == "n_fgsm" else 3):
            model.calls[0] = calls
            try:
                with frozen_eval(model):
                    attack(model, x, y, THREAT)
                assert calls == 10**9
            except KilledError:
                assert calls < 10**9
            assert trained.features[1].training and not trained.head.training
            assert [p.requires_grad for p in trained.parameters()] == [True] * 5 + [False]
            assert all(p.grad is None for p in trained.parameters())
            assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    finally:
        trained.eval()
        trained.head.bias.requires_grad_(True)


# --- strength ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two classes, so that the worst point is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        value = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([-value, value], dim=1)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("l2", 0.1)])
def test_apgd_reaches_the_analytic_worst_case_and_square_comes_near(norm: str, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, generator=generator)
    x = 0.3 + 0.4 * torch.rand(400, 3, 4, 4, generator=generator)
    signed = (x.flatten(1) - 0.5) @ weight
    y = (signed > 0).long()
    reach = epsilon * float(weight.abs().sum() if norm == "linf" else weight.norm())
    expected = int((signed.abs() > reach).sum())
    assert 50 < expected < 350
    model, threat = Linear(weight).eval(), ThreatModel(norm, epsilon)
    with frozen_eval(model):
        assert standing(model, apgd(model, x, y, threat, steps=50, generator=seeded()), y) == pytest.approx(
            expected, abs=1
        )
        found = standing(model, square(model, x, y, threat, queries=600, generator=seeded()), y)
    assert expected <= found <= expected + 0.5 * (400 - expected)


@pytest.mark.parametrize("threat", [THREAT, L2], ids=str)
def test_no_weaker_than_the_standards_own(trained: Tiny, right: tuple[Tensor, Tensor], threat: ThreatModel) -> None:
    from pyautoattack import AutoAttack

    x, y = right
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    with frozen_eval(trained), torch.random.fork_rng():
        theirs = AutoAttack(trained, norm=norm, eps=threat.epsilon, seed=0)
        theirs.square.n_queries = 1000
        for attack, ours in {
            "apgd-ce": apgd(trained, x, y, threat, generator=seeded()),
            "apgd-dlr": apgd(trained, x, y, threat, loss="dlr", generator=seeded()),
            "square": square(trained, x, y, threat, queries=1000, generator=seeded()),
        }.items():
            theirs.attacks_to_run = [attack]
            reference = theirs.run_standard_evaluation(x, y, batch_size=len(x))[0]
            assert standing(trained, ours, y) <= standing(trained, reference, y) + 1, attack


def test_square_needs_answers_only(trained: Tiny, right: tuple[Tensor, Tensor]) -> None:
    x, y = right
    asked: list[int] = []

    def predict(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(images))
        return torch.from_numpy(trained(images).numpy())

    points = square(predict, x, y, THREAT, queries=50, generator=seeded())
    left = standing(trained, points, y)
    assert left < len(x) and len(asked) <= 50
    assert asked[0] == len(x) and asked == sorted(asked, reverse=True) and asked[-1] >= left


def test_fallen_images_are_not_attacked_any_further(trained: Tiny, right: tuple[Tensor, Tensor]) -> None:
    x, y = right
    sizes: list[int] = []

    class Counting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return trained(images)

    with frozen_eval(trained):
        points = apgd(Counting(), x, y, THREAT, generator=seeded())
    left = standing(trained, points, y)
    assert sizes[0] == len(x) and sizes == sorted(sizes, reverse=True)
    assert left <= sizes[-1] <= left + len(x) / 8 + 1


def test_the_judge_decides_what_is_lost(trained: Tiny, right: tuple[Tensor, Tensor]) -> None:
    """Images that look lost in low precision only must be attacked further."""
    x, y = right
    sizes: list[int] = []

    def generous(images: Tensor) -> Tensor:
        """Has every image right: its label is that of the nearest original."""
        sizes.append(len(images))
        nearest = torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)
        return nn.functional.one_hot(y[nearest], CLASSES).float()

    with frozen_eval(trained):
        trusted = apgd(trained, x, y, THREAT, generator=seeded())
        judged = apgd(trained, x, y, THREAT, generator=seeded(), judge=trained)
        never = apgd(trained, x, y, THREAT, generator=seeded(), judge=generous)
        losses = [cross_entropy(trained(points), y) for points in (trusted, never)]
    assert torch.equal(trusted, judged)
    assert len(sizes) > 50 and sizes[-1] > 50
    lost = misclassified(trained(trusted).detach(), y)
    assert lost.sum() > 50 and (losses[1] > losses[0])[lost].float().mean() > 0.9, "the attack stopped too early"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "knows the losses ce, dlr"),
        ({"target": torch.zeros(4, dtype=torch.long)}, "knows the losses"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
    ],
)
def test_bad_arguments(trained: Tiny, arguments: dict[str, object], message: str) -> None:
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match=message):
        apgd(trained, x, y, THREAT, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="queries must be at least 1"):
        square(trained, x, y, THREAT, queries=0)


def test_two_classes_have_no_ratio() -> None:
    model = Linear(torch.randn(48)).eval()
    x, y = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match="at least 3 classes"):
        apgd(model, x, y, THREAT, loss="dlr")
    assert apgd(model, x, y, THREAT, loss="dlr", target=1 - y, steps=3).shape == x.shape
