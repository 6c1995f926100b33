"""Training learns, resumes bit by bit, and notices when it goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.augment import crop_and_flip
from robust_prune.data.base import TensorImages
from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.recipe import LOSSES, TrainSettings
from robust_prune.training import trainer
from robust_prune.training.losses import Batch, make_loss
from robust_prune.training.trainer import decay_groups, train

THREAT = ThreatModel("linf", 4 / 255)


def _images(count: int, seed: int = 0) -> TensorImages:
    """Three classes told apart by the brightest colour channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 80
    return TensorImages(images, labels)


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def _settings(**changes) -> TrainSettings:
    return TrainSettings(
        **{
            "epochs": 3, "batch_size": 16, "lr": 0.2, "ema_decay": 0.9, "crop_padding": 1, "validation_images": 30,
            "validation_steps": 2, "steps": 2, **changes,
        }
    )  # fmt: skip


def test_epochs_are_logged_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(
        _model(), _images(60), _images(30, 1), THREAT, _settings(trackers=("tensorboard",)),
        checkpoint=tmp_path / "checkpoint.pt",
    ).history  # fmt: skip
    events = EventAccumulator(str(tmp_path / "trackers")).Reload()
    logged = [(point.step, point.value) for point in events.Scalars("val_robust")]
    assert logged == [(record.epoch, pytest.approx(record.val_robust)) for record in history]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: [])
    with pytest.raises(EnvironmentProblem, match=r"tracker tensorboard was asked for.*robust-prune\[tensorboard\]"):
        train(_model(), _images(60), _images(30, 1), THREAT, _settings(trackers=("tensorboard",)))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    # Timing decides the memory layout, and the layout the rounding: fixed here so that runs can be compared.
    monkeypatch.setattr(trainer, "choose_precision", lambda model, x: trainer.Precision(False, False))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss):
    model = _model()
    result = train(model, _images(96), _images(30, 1), THREAT, _settings(loss=loss, epochs=4))
    assert result.history[-1].val_clean > 0.9
    assert max(record.val_robust for record in result.history) > 0.6
    assert len(result.history) == 4 and not result.note


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 5, 6, 13])
def test_a_killed_run_ends_bit_identical(tmp_path, monkeypatch, kill_at):
    settings = _settings(loss="pgd_at")
    whole = _model()
    expected = train(whole, _images(96), _images(30, 1), THREAT, settings)

    real, calls = trainer._Run._step, 0

    def step(self, indices):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise _Killed
        return real(self, indices)

    monkeypatch.setattr(trainer._Run, "_step", step)
    checkpoint = tmp_path / "checkpoint.pt"
    arguments = dict(checkpoint=checkpoint, checkpoint_seconds=0.0)
    with pytest.raises(_Killed):
        train(_model(), _images(96), _images(30, 1), THREAT, settings, **arguments)
    monkeypatch.setattr(trainer._Run, "_step", real)
    resumed = _model(seed=99)
    if not checkpoint.exists():
        resumed = _model()
    result = train(resumed, _images(96), _images(30, 1), THREAT, settings, **arguments)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in _weights(whole).items())
    strip = [(r.epoch, r.train_loss, r.val_clean, r.val_robust, r.source, r.lr) for r in result.history]
    assert strip == [(r.epoch, r.train_loss, r.val_clean, r.val_robust, r.source, r.lr) for r in expected.history]


def test_a_checkpoint_of_other_settings_or_a_torn_one_is_not_used(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    train(_model(), _images(96), _images(30, 1), THREAT, _settings(epochs=1), checkpoint=checkpoint)
    result = train(_model(), _images(96), _images(30, 1), THREAT, _settings(epochs=2), checkpoint=checkpoint)
    assert len(result.history) == 2
    assert "other settings" in capsys.readouterr().out
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    result = train(_model(), _images(96), _images(30, 1), THREAT, _settings(epochs=2), checkpoint=checkpoint)
    assert len(result.history) == 2
    assert "damaged" in capsys.readouterr().out


def test_a_nan_loss_stops_the_run_in_one_clear_line():
    model = _model()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(QualityGateError, match=r"training loss became nan in epoch 1, step 1\. Lower the learning"):
        train(model, _images(32), _images(30, 1), THREAT, _settings())


def test_collapse_goes_back_to_the_best_epoch(monkeypatch):
    scores = iter([(0.1, 0.3), (0.6, 0.7), (0.6, 0.7), (0.2, 0.9), (0.2, 0.9)])
    monkeypatch.setattr(trainer._Run, "_score", lambda self, model: trainer.Score(*next(scores)))
    result = train(_model(), _images(32), _images(30, 1), THREAT, _settings(loss="n_fgsm", epochs=5))
    assert len(result.history) == 2 and result.best_epoch == 1
    assert "fell from 60.0 to 20.0 %" in result.note


def test_training_that_taught_nothing_is_said():
    unrelated = TensorImages(_images(90, 1).images, torch.arange(90) // 30)
    result = train(_model(), _images(96), unrelated, THREAT, _settings(epochs=1, validation_images=90))
    assert "naming the most frequent class gets 33.3: nothing was learned" in result.note
    assert train(_model(), _images(96), _images(90, 1), THREAT, _settings(epochs=6)).note == ""


def test_zero_epochs_leave_the_model_as_it_was():
    model = _model()
    before = _weights(model)
    assert train(model, _images(32), _images(30, 1), THREAT, _settings(epochs=0)).best_epoch == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UsageError, match="at least 2 images, got 1"):
        train(_model(), _images(1), _images(30, 1), THREAT, _settings())


def test_a_batch_larger_than_the_data_set_is_one_step():
    result = train(_model(), _images(10), _images(30, 1), THREAT, _settings(epochs=1, batch_size=64))
    assert len(result.history) == 1


def test_trades_matches_its_definition_and_survives_extreme_logits():
    model = _model().eval()
    x, y = _images(6).get(torch.arange(6))
    batch = Batch(x.float() / 255, y, ThreatModel("linf", 0.0), torch.Generator().manual_seed(0), model)
    loss = make_loss(_settings(loss="trades", steps=1, label_smoothing=0.0))
    # With epsilon 0 both distributions are the same and only the clean cross-entropy is left.
    assert loss(model, batch).loss.item() == pytest.approx(F.cross_entropy(model(batch.x), y).item(), rel=1e-5)
    with torch.no_grad():
        model[5].weight.mul_(1e6)
    steep = Batch(batch.x, y, THREAT, torch.Generator().manual_seed(0), model)
    assert torch.isfinite(loss(model, steep).loss)


def test_losses_leave_modes_and_flags_alone():
    model = _model().train()
    model[1].eval()
    x, y = _images(6).get(torch.arange(6))
    batch = Batch(x.float() / 255, y, THREAT, torch.Generator().manual_seed(0), model)
    for name in LOSSES:
        make_loss(_settings(loss=name))(model, batch).loss.backward()
        assert model.training and not model[1].training and model[0].weight.requires_grad


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"must be one of n_fgsm, .* or file.py:function"):
        _settings(loss="magic")
    with pytest.raises(UsageError, match=r"unknown loss 'magic'\. Choose one of n_fgsm"):
        make_loss(_settings().model_copy(update={"loss": "magic"}))


def test_norms_and_biases_are_not_decayed():
    decayed, plain = decay_groups(_model(), 0.1)
    assert {p.ndim for p in decayed["params"]} == {2, 4} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0


def test_crop_and_flip_move_whole_images():
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).view(2, 1, 4, 4) + 1
    same = crop_and_flip(images, 0, False, torch.Generator().manual_seed(0))
    assert torch.equal(same, images)
    seen = set()
    for seed in range(40):
        out = crop_and_flip(images, 1, True, torch.Generator().manual_seed(seed))
        assert out.shape == images.shape and out.dtype == torch.uint8
        padded = F.pad(images[0], (1, 1, 1, 1))
        windows = {
            (dy, dx, flip): (padded.flip(2) if flip else padded)[:, dy : dy + 4, dx : dx + 4]
            for dy in range(3)
            for dx in range(3)
            for flip in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, out[0])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10


def test_files_appear_whole_or_not_at_all(tmp_path):
    from robust_prune.run_dir import atomic_write

    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Exception, match=r"cannot write .*disk full\. Free some space"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
