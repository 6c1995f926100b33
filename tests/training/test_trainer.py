"""Training learns, resumes bit by bit, and notices when it goes wrong."""

from __future__ import annotations

import time

import pytest
import torch
from builders.training_sample import THREAT, Killed, make_images, make_model, make_settings, weights_of
from torch import nn

from robust_prune.catalogue import LOSSES
from robust_prune.data.base import TensorImages
from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.training import acceleration, trainer
from robust_prune.training.precision import choose_precision
from robust_prune.training.trainer import train
from robust_prune.training.validation import Score


def test_epochs_are_logged_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(
        make_model(), make_images(60), make_images(30, 1), THREAT, make_settings(trackers=("tensorboard",)),
        checkpoint=tmp_path / "checkpoint.pt",
    ).history  # fmt: skip
    events = EventAccumulator(str(tmp_path / "trackers")).Reload()
    logged = [(point.step, point.value) for point in events.Scalars("val_robust")]
    assert logged == [(record.epoch, pytest.approx(record.val_robust)) for record in history]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(acceleration, "get_available_trackers", lambda: [])
    with pytest.raises(EnvironmentProblem, match=r"tracker tensorboard was asked for.*robust-prune\[tensorboard\]"):
        train(make_model(), make_images(60), make_images(30, 1), THREAT, make_settings(trackers=("tensorboard",)))


@pytest.mark.parametrize("loss", LOSSES.names)
def test_every_loss_learns(loss):
    model = make_model()
    result = train(model, make_images(96), make_images(30, 1), THREAT, make_settings(loss=loss, epochs=4))
    assert result.history[-1].val_clean > 0.9
    assert max(record.val_robust for record in result.history) > 0.6
    assert len(result.history) == 4 and not result.note


@pytest.mark.parametrize("kill_at", [1, 5, 6, 13])
def test_a_killed_run_ends_bit_identical(tmp_path, monkeypatch, kill_at):
    settings = make_settings(loss="pgd_at")
    whole = make_model()
    expected = train(whole, make_images(96), make_images(30, 1), THREAT, settings)

    real, calls = trainer._Run._step, 0

    def step(self, x, y):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        return real(self, x, y)

    monkeypatch.setattr(trainer._Run, "_step", step)
    checkpoint = tmp_path / "checkpoint.pt"
    arguments = dict(checkpoint=checkpoint)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Killed):
        train(make_model(), make_images(96), make_images(30, 1), THREAT, settings, **arguments)
    begun, calls, kill_at = checkpoint.exists(), 0, 0
    resumed = make_model()
    result = train(resumed, make_images(96), make_images(30, 1), THREAT, settings, **arguments)
    assert (calls < 18) == begun
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in weights_of(whole).items())
    strip = [(r.epoch, r.train_loss, r.val_clean, r.val_robust, r.source, r.lr) for r in result.history]
    assert strip == [(r.epoch, r.train_loss, r.val_clean, r.val_robust, r.source, r.lr) for r in expected.history]


def test_a_checkpoint_of_other_settings_or_a_torn_one_is_not_used(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    train(make_model(), make_images(96), make_images(30, 1), THREAT, make_settings(epochs=1), checkpoint=checkpoint)
    result = train(
        make_model(), make_images(96), make_images(30, 1), THREAT, make_settings(epochs=2), checkpoint=checkpoint
    )
    assert len(result.history) == 2
    assert "other settings" in capsys.readouterr().out
    value = torch.load(checkpoint, weights_only=True)
    next(iter(value["model"].values())).flatten()[0] += 1
    torch.save(value, checkpoint)
    for words in ("damaged (SHA-256)", "damaged"):
        result = train(
            make_model(), make_images(96), make_images(30, 1), THREAT, make_settings(epochs=2), checkpoint=checkpoint
        )
        assert len(result.history) == 2
        assert words in capsys.readouterr().out
        checkpoint.write_bytes(checkpoint.read_bytes()[:200])


def test_a_hostile_checkpoint_is_not_read(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    endless: list[object] = []
    endless.append(endless)
    for hostile in (endless, {"model": torch.zeros(1).expand(3 * 10**8)}):
        torch.save({"key": hostile}, checkpoint)
        begin = time.monotonic()
        train(make_model(), make_images(96), make_images(30, 1), THREAT, make_settings(epochs=1), checkpoint=checkpoint)
        assert "checkpoint.pt is damaged (UsageError)" in capsys.readouterr().out
        assert time.monotonic() - begin < 30


def test_a_nan_loss_stops_the_run_in_one_clear_line():
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(QualityGateError, match=r"training loss became nan in epoch 1, step 1\. Lower the learning"):
        train(model, make_images(32), make_images(30, 1), THREAT, make_settings())


def test_a_nan_loss_later_on_keeps_the_best_epoch(tmp_path, monkeypatch):
    checkpoint, plain = tmp_path / "checkpoint.pt", trainer._Run._forward_backward

    def breaks(run, batch):
        if run.state.epoch == 2:
            with torch.no_grad():
                run.model[0].weight.fill_(float("nan"))
        return plain(run, batch)

    monkeypatch.setattr(trainer._Run, "_forward_backward", breaks)
    model, settings = make_model(), make_settings(epochs=5)
    result = train(model, make_images(96), make_images(30, 1), THREAT, settings, checkpoint=checkpoint)
    assert result.best_epoch in (1, 2) and len(result.history) == 2
    assert "loss became nan in epoch 3, step 1. Lower" in result.note
    assert result.note.endswith(f"Went back to epoch {result.best_epoch}.")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    again = train(make_model(), make_images(96), make_images(30, 1), THREAT, settings, checkpoint=checkpoint)
    assert again.note == result.note


def test_without_held_out_images_the_last_epoch_stays():
    model = make_model()
    before = weights_of(model)
    result = train(model, make_images(96), make_images(30, 1), THREAT, make_settings(validation_images=0))
    assert result.best_epoch == 3 and result.short() == "3 epochs, epoch 3 was selected"
    assert result.history[-1].val_clean is None and result.history[-1].val_robust is None
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_dropout_follows_the_seed_alone(tmp_path):
    def trained(noise: int) -> dict[str, torch.Tensor]:
        model = nn.Sequential(*make_model()[:5], nn.Dropout(0.5), nn.Linear(8, 3))
        model[6].load_state_dict({"weight": torch.eye(8)[:3], "bias": torch.zeros(3)})
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        train(model, make_images(48), make_images(30, 1), THREAT, make_settings(epochs=2))
        assert torch.equal(torch.random.get_rng_state(), before)
        return model.state_dict()

    one, two = trained(1), trained(2)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_model_that_views_its_features_and_no_momentum(monkeypatch):
    monkeypatch.setattr(trainer, "choose_precision", choose_precision)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Viewing(), nn.Linear(512, 3))
    result = train(model, make_images(48), make_images(30, 1), THREAT, make_settings(epochs=1, momentum=0))
    assert len(result.history) == 1


class Viewing(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_a_checkpoint_of_another_model_or_other_images_is_not_used(tmp_path, capsys):
    checkpoint, settings = tmp_path / "checkpoint.pt", make_settings(epochs=1)
    train(make_model(), make_images(96), make_images(30, 1), THREAT, settings, checkpoint=checkpoint)
    for model, images in ((make_model(1), make_images(96)), (make_model(), make_images(96, 5))):
        train(model, images, make_images(30, 1), THREAT, settings, checkpoint=checkpoint)
        assert "other settings" in capsys.readouterr().out


def test_collapse_goes_back_to_the_best_epoch(monkeypatch):
    scores = iter([(0.1, 0.3), (0.6, 0.7), (0.6, 0.7), (0.2, 0.9), (0.2, 0.9)])
    monkeypatch.setattr(trainer._Run, "_score", lambda self, model: trainer.Score(*next(scores)))
    result = train(make_model(), make_images(32), make_images(30, 1), THREAT, make_settings(loss="n_fgsm", epochs=5))
    assert len(result.history) == 2 and result.best_epoch == 1
    assert "fell from 60.0 to 20.0 %" in result.note


def test_the_better_of_live_and_averaged_weights_counts_and_the_best_epoch_stays(monkeypatch):
    robust = iter([0.1, 0.4, 0.6, 0.5, 0.3, 0.6, 0.6])  # at the start, then live and averaged after each epoch
    scored = []

    def scripted(run, model):
        scored.append(models_hash(model))
        return trainer.Score(next(robust), 0.7)

    monkeypatch.setattr(trainer._Run, "_score", scripted)
    model = make_model()
    result = train(model, make_images(32), make_images(30, 1), THREAT, make_settings(loss="clean", epochs=3))
    assert [(r.source, r.val_robust) for r in result.history] == [("average", 0.6), ("live", 0.5), ("live", 0.6)]
    assert result.best_epoch == 1, "a later epoch that is no better took its place"
    assert models_hash(model) == scored[2] and len(set(scored)) == 7


@pytest.mark.parametrize(("loss", "best"), [("clean", 2), ("n_fgsm", 0)])
def test_clean_training_selects_by_clean_accuracy(monkeypatch, loss, best):
    """An untrained network that names one class has some robust accuracy, a well trained one without attacks none."""
    found = iter([Score(0.1, 0.1), Score(0.0, 0.6), Score(0.0, 0.6), Score(0.0, 0.9), Score(0.0, 0.9)])
    monkeypatch.setattr(trainer, "score", lambda *_, **__: next(found))
    result = train(make_model(), make_images(32), make_images(30, 1), THREAT, make_settings(loss=loss, epochs=2))
    assert result.best_epoch == best


def test_training_that_taught_nothing_is_said():
    unrelated = TensorImages(make_images(90, 1).images, torch.arange(90) // 30)
    result = train(make_model(), make_images(96), unrelated, THREAT, make_settings(epochs=1, validation_images=90))
    assert "naming the most frequent class gets 33.3: nothing was learned" in result.note
    assert train(make_model(), make_images(96), make_images(90, 1), THREAT, make_settings(epochs=6)).note == ""


def test_zero_epochs_leave_the_model_as_it_was():
    model = make_model()
    before = weights_of(model)
    assert train(model, make_images(32), make_images(30, 1), THREAT, make_settings(epochs=0)).best_epoch == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UsageError, match="at least 2 images, got 1"):
        train(make_model(), make_images(1), make_images(30, 1), THREAT, make_settings())


def test_a_batch_larger_than_the_data_set_is_one_step():
    result = train(make_model(), make_images(10), make_images(30, 1), THREAT, make_settings(epochs=1, batch_size=64))
    assert len(result.history) == 1
