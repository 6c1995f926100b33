"""Losses beyond the plain ones: MART, distillation, a user's own, and weight perturbation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_training import THREAT, _images, _Killed, _model, _settings, _weights
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, kept_buffers
from robust_prune.cli import app
from robust_prune.errors import UsageError
from robust_prune.training import trainer
from robust_prune.training.losses import Batch, LossResult, distilled, make_loss, users_loss
from robust_prune.training.perturbation import perturbed_weights
from robust_prune.training.trainer import train

MINE = '''
from robust_prune.attacks import pgd
from robust_prune.training.losses import LossResult
import torch.nn.functional as F

def margin(model, batch):
    """Logit margin on PGD examples."""
    x_adv = batch.adversarial(lambda m: pgd(m, batch.x, batch.y, batch.threat, steps=2, generator=batch.generator))
    logits = model(x_adv).float()
    own = logits.gather(1, batch.y[:, None])
    rival = logits.scatter(1, batch.y[:, None], float("-inf")).amax(1, keepdim=True)
    accuracy = (logits.argmax(1) == batch.y).float().mean().detach()
    return LossResult(F.softplus(rival - own).mean(), {"accuracy": accuracy}, logits)

def scalar(model, batch):
    return F.cross_entropy(model(batch.x), batch.y)

def wrong(model, batch):
    return model(batch.x)

def broken(model, batch):
    return 1 / 0
'''


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "choose_precision", lambda model, x: trainer.Precision(False, False))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE, encoding="utf-8")
    return file


def batch_of(model: nn.Module, count: int = 12, epsilon: float = 4 / 255, teacher: nn.Module | None = None) -> Batch:
    x, y = _images(count).get(torch.arange(count))
    threat = ThreatModel("linf", epsilon)
    return Batch(x.float() / 255, y, threat, torch.Generator().manual_seed(0), model, teacher)


# --- MART --------------------------------------------------------------------------------------------------------


def test_mart_matches_its_definition_and_survives_extreme_logits() -> None:
    model = _model().eval()
    loss = make_loss(_settings(loss="mart", label_smoothing=0.0))
    batch = batch_of(model, epsilon=0.0)
    with torch.no_grad():
        p = model(batch.x).softmax(1)
        rival = p.clone().scatter(1, batch.y[:, None], 0).amax(1)
        expected = (-p.gather(1, batch.y[:, None]).squeeze(1).log() - (1 - rival).log()).mean()
    # With epsilon 0 the divergence is 0 and the boosted cross-entropy is left.
    assert loss(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        model[5].weight.mul_(1e6)
    result = loss(model, batch_of(model))
    result.loss.backward()
    assert torch.isfinite(result.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- distillation ------------------------------------------------------------------------------------------------


def test_distillation_is_the_divergence_from_the_teacher_on_adversarial_images() -> None:
    model, teacher = _model(0).eval(), _model(1).eval().requires_grad_(False)
    batch = batch_of(model, teacher=teacher)
    base = make_loss(_settings(loss="pgd_at", label_smoothing=0.0))
    plain = base(model, batch)
    x_adv = batch.adversarial(lambda m: pytest.fail("the batch was attacked twice"))
    t = 2.0
    with torch.no_grad():
        expected = t * t * F.kl_div(
            F.log_softmax(model(x_adv) / t, 1), F.softmax(teacher(batch.x) / t, 1), reduction="batchmean"
        )  # fmt: skip
    whole = distilled(base, 1.0, t)(model, batch).loss
    half = distilled(base, 0.5, t)(model, batch).loss
    assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
    assert half.item() == pytest.approx((plain.loss.item() + whole.item()) / 2, rel=1e-5)


def test_a_distilled_student_follows_its_teacher() -> None:
    teacher = _model(1)
    train(teacher, _images(96), _images(30, 1), THREAT, _settings(epochs=4))
    teacher.zero_grad()
    noise = _images(96)
    noise.labels.copy_(noise.labels[torch.randperm(96, generator=torch.Generator().manual_seed(0))])
    student = _model(2)
    # The labels are worthless: whatever is learnt comes from the teacher.
    settings = _settings(epochs=4, distillation=1.0)
    train(student, noise, _images(30, 1), THREAT, settings, teacher=teacher)
    x, y = _images(60, 3).get(torch.arange(60))
    student.eval()
    assert (student(x.float() / 255).argmax(1) == y).float().mean() > 0.9
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_distillation_without_a_teacher_or_logits_is_refused(mine: Path) -> None:
    with pytest.raises(UsageError, match="needs the dense parent"):
        train(_model(), _images(60), _images(30, 1), THREAT, _settings(distillation=0.5))
    model = _model()
    loss = make_loss(_settings(loss=f"{mine}:scalar", distillation=0.5))
    with pytest.raises(UsageError, match=r"set LossResult.logits"):
        loss(model, batch_of(model, teacher=model))


# --- a user's own loss -------------------------------------------------------------------------------------------


def test_a_users_loss_trains_resumes_and_is_part_of_the_key(mine: Path, tmp_path: Path, monkeypatch) -> None:
    settings = _settings(loss=f"{mine}:margin", epochs=3)
    whole = _model()
    result = train(whole, _images(96), _images(30, 1), THREAT, settings)
    assert result.history[-1].val_robust > 0.6
    calls = [0]
    step = trainer._Run._step

    def dying(run: trainer._Run, indices: Tensor) -> tuple[float, float]:
        calls[0] += 1
        if calls[0] == 9:
            raise _Killed
        return step(run, indices)

    monkeypatch.setattr(trainer._Run, "_step", dying)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    resumed, checkpoint = _model(), tmp_path / "checkpoint.pt"
    arguments = (_images(96), _images(30, 1), THREAT, settings)
    with pytest.raises(_Killed):
        train(resumed, *arguments, checkpoint=checkpoint)
    resumed = _model()
    train(resumed, *arguments, checkpoint=checkpoint)
    assert all(torch.equal(value, _weights(whole)[name]) for name, value in _weights(resumed).items())
    mine.write_text(MINE + "\n# changed\n", encoding="utf-8")
    run = trainer._Run(_model(), *arguments, 0, trainer.make_accelerator(settings, "cpu", tmp_path), checkpoint, None)
    assert not run.resume()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", r"must return a LossResult or a scalar tensor, got a tensor \[12, 3\]"),
        ("broken", r"failed: .*mine\.py:\d+: ZeroDivisionError"),
        ("absent", "has no function 'absent'"),
        ("margn", r"has no function 'margn'\. Did you mean margin\?"),
    ],
)
def test_what_is_no_loss_is_refused_with_its_place(mine: Path, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        users_loss(f"{mine}:{function}")(_model(), batch_of(_model()))


def test_a_scalar_is_enough(mine: Path) -> None:
    model = _model()
    assert isinstance(users_loss(f"{mine}:scalar")(model, batch_of(model)), LossResult)
    with pytest.raises(UsageError, match="does not exist"):
        make_loss(_settings(loss="absent.py:loss"))


def test_the_command_takes_a_users_loss(mine: Path, tmp_path: Path) -> None:
    app(
        ["train", "--recipe", "smoke", "--loss", f"{mine}:margin", "--epochs", "1", "--out", str(tmp_path / "run"),
         "--images", "16"],
        exit_on_error=False,
    )  # fmt: skip
    assert (tmp_path / "run" / "model.safetensors").is_file()


# --- weight perturbation -----------------------------------------------------------------------------------------


def test_weights_move_uphill_by_their_share_and_come_back_exactly() -> None:
    model = _model().eval()
    batch = batch_of(model)
    loss = make_loss(_settings(loss="pgd_at"))
    before = _weights(model)
    result = loss(model, batch)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with perturbed_weights(model, gradients, 0.01):
        assert loss(model, batch).loss > result.loss
        for name, parameter in model.named_parameters():
            moved = (parameter - before[name]).norm() / before[name].norm().clamp_min(1e-9)
            assert moved.item() == pytest.approx(0.01 if parameter.ndim > 1 else 0.0, rel=1e-3)
    assert all(torch.equal(before[name], value) for name, value in _weights(model).items())
    with pytest.raises(_Killed), perturbed_weights(model, gradients, 0.5):
        raise _Killed
    assert all(torch.equal(before[name], value) for name, value in _weights(model).items())


def test_statistics_do_not_see_the_extra_pass() -> None:
    model = _model().train()
    before = copy.deepcopy(model[1].state_dict())
    with kept_buffers(model):
        model(torch.rand(4, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())


def test_perturbed_training_learns_and_waits_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    result = train(model, _images(96), _images(30, 1), THREAT, _settings(epochs=4, awp=0.01))
    assert result.history[-1].val_clean > 0.9
    passes = [0]
    forward = trainer._Run._forward_backward

    def counted(run: trainer._Run, batch: Batch) -> LossResult:
        passes[0] += 1
        return forward(run, batch)

    monkeypatch.setattr(trainer._Run, "_forward_backward", counted)
    train(_model(), _images(96), _images(30, 1), THREAT, _settings(epochs=2, awp=0.01, awp_warmup=0.5))
    assert passes[0] == 6 + 2 * 6
