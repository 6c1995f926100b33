"""Training learns, resumes bit by bit, and notices when it goes wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.catalogue import LOSSES
from robust_prune.compression import Length
from robust_prune.data.augment import crop_and_flip
from robust_prune.data.base import TensorImages
from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.recipe import TrainSettings
from robust_prune.runs.files import atomic_write
from robust_prune.runs.run import Run, claim
from robust_prune.training import acceleration, trainer
from robust_prune.training.losses import Batch, make_loss
from robust_prune.training.optimizer import decay_groups, peak_rate
from robust_prune.training.precision import choose_precision
from robust_prune.training.trainer import train
from robust_prune.training.validation import score

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


def test_the_learning_rate_falls_along_a_cosine_from_the_end_of_the_warm_up_to_zero_at_the_end_of_the_run():
    images = _images(64)  # 4 steps an epoch, 20 in all, 5 of them warm-up
    history = train(_model(), images, _images(30, 1), THREAT, _settings(epochs=5, warmup=0.25, lr=0.2)).history
    done = [(4 * (epoch + 1) - 1 - 5) / 15 for epoch in range(1, 5)]
    assert [record.lr for record in history[1:]] == pytest.approx([0.1 * (1 + math.cos(math.pi * d)) for d in done])
    assert history[-1].lr < 0.003


def test_a_short_run_takes_a_lower_peak_rate_unless_it_is_told_one():
    assert [peak_rate(TrainSettings(), steps) for steps in (150, 600, 9000)] == pytest.approx([0.05, 0.1, 0.1])
    assert peak_rate(TrainSettings(lr=0.3), 150) == 0.3
    images = _images(64)  # 4 steps an epoch, the last of 8 at a fraction of the peak
    rates = [train(_model(), images, _images(30, 1), THREAT, _settings(epochs=2, lr=lr)).history[-1].lr
             for lr in (None, 0.1 * math.sqrt(8 / 600))]  # fmt: skip
    assert rates[0] == rates[1] > 0


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(acceleration, "get_available_trackers", lambda: [])
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


@pytest.mark.parametrize("loss", LOSSES.names)
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
    arguments = dict(checkpoint=checkpoint)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(_Killed):
        train(_model(), _images(96), _images(30, 1), THREAT, settings, **arguments)
    begun, calls, kill_at = checkpoint.exists(), 0, 0
    resumed = _model()
    result = train(resumed, _images(96), _images(30, 1), THREAT, settings, **arguments)
    assert (calls < 18) == begun
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


def test_a_nan_loss_later_on_keeps_the_best_epoch(tmp_path, monkeypatch):
    checkpoint, plain = tmp_path / "checkpoint.pt", trainer._Run._forward_backward

    def breaks(run, batch):
        if run.state.epoch == 2:
            with torch.no_grad():
                run.model[0].weight.fill_(float("nan"))
        return plain(run, batch)

    monkeypatch.setattr(trainer._Run, "_forward_backward", breaks)
    model, settings = _model(), _settings(epochs=5)
    result = train(model, _images(96), _images(30, 1), THREAT, settings, checkpoint=checkpoint)
    assert result.best_epoch in (1, 2) and len(result.history) == 2
    assert "loss became nan in epoch 3, step 1. Lower" in result.note
    assert result.note.endswith(f"Went back to epoch {result.best_epoch}.")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    again = train(_model(), _images(96), _images(30, 1), THREAT, settings, checkpoint=checkpoint)
    assert again.note == result.note


def test_without_held_out_images_the_last_epoch_stays():
    model = _model()
    before = _weights(model)
    result = train(model, _images(96), _images(30, 1), THREAT, _settings(validation_images=0))
    assert result.best_epoch == 3
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_logits_that_are_not_finite_are_never_right():
    model = _model()
    with torch.no_grad():
        model[5].bias.fill_(float("nan"))
    images = TensorImages(_images(30).images, torch.zeros(30, dtype=torch.long))
    precision = trainer.Precision(bf16=False, channels_last=False)
    found = score(model, images, THREAT, steps=1, seed=0, device=torch.device("cpu"), precision=precision)
    assert found == (0.0, 0.0)


def test_dropout_follows_the_seed_alone(tmp_path):
    def trained(noise: int) -> dict[str, torch.Tensor]:
        model = nn.Sequential(*_model()[:5], nn.Dropout(0.5), nn.Linear(8, 3))
        model[6].load_state_dict({"weight": torch.eye(8)[:3], "bias": torch.zeros(3)})
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        train(model, _images(48), _images(30, 1), THREAT, _settings(epochs=2))
        assert torch.equal(torch.random.get_rng_state(), before)
        return model.state_dict()

    one, two = trained(1), trained(2)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_model_that_views_its_features_and_no_momentum(monkeypatch):
    monkeypatch.setattr(trainer, "choose_precision", choose_precision)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Viewing(), nn.Linear(512, 3))
    result = train(model, _images(48), _images(30, 1), THREAT, _settings(epochs=1, momentum=0))
    assert len(result.history) == 1


class Viewing(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_a_checkpoint_of_another_model_or_other_images_is_not_used(tmp_path, capsys):
    checkpoint, settings = tmp_path / "checkpoint.pt", _settings(epochs=1)
    train(_model(), _images(96), _images(30, 1), THREAT, settings, checkpoint=checkpoint)
    for model, images in ((_model(1), _images(96)), (_model(), _images(96, 5))):
        train(model, images, _images(30, 1), THREAT, settings, checkpoint=checkpoint)
        assert "other settings" in capsys.readouterr().out


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
    for name in LOSSES.names:
        make_loss(_settings(loss=name))(model, batch).loss.backward()
        assert model.training and not model[1].training and model[0].weight.requires_grad


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"must be one of clean, .* or file.py:function"):
        _settings(loss="magic")
    with pytest.raises(UsageError, match=r"loss must be one of clean, .*, got 'magic'"):
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
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Exception, match=r"cannot write .*disk full\. Free some space"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_in_torchs_words_is_said_plainly(tmp_path):
    def fail(part: Path) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*Free some space"):
        atomic_write(tmp_path / "x.pt", fail)

    def bug(part: Path) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake"):
        atomic_write(tmp_path / "x.pt", bug)


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, "key", "robust-prune")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"not a run folder and holds model\.safetensors, which a run would overwrite"):
        claim(other, "key", "robust-prune")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UsageError, match="holds a run with another model"):
        claim(tmp_path, "key", "robust-prune")


def test_a_stage_is_made_once_for_the_same_inputs_and_anew_where_its_record_or_a_file_is_gone(tmp_path):
    calls = []
    run = Run(tmp_path, "key")

    def stage(*inputs, run=run):
        return run.stage("cut", Length, inputs, lambda: calls.append(inputs) or Length(5, len(calls)), files=[file])

    file = tmp_path / "model"
    file.write_text("x")
    assert stage(1) == Length(5, 1) == stage(1) and len(calls) == 1
    assert stage(2) == Length(5, 2) and run.seconds["cut"] >= 0
    assert stage(2, run=Run(tmp_path, "other")) == Length(5, 3)
    mark = tmp_path / "cut" / "stage.json"
    for damaged in ("[]", "{", mark.read_text().replace('"epochs": 5', '"epochs": "many"')):
        mark.write_text(damaged)
        before = len(calls)
        stage(2, run=Run(tmp_path, "other"))
        assert len(calls) == before + 1
    file.unlink()
    before = len(calls)
    stage(2, run=Run(tmp_path, "other"))
    assert len(calls) == before + 1


def test_a_run_of_an_older_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"key": "key", "command": "robust-prune"}')
    with pytest.raises(UsageError, match="holds a run of another version of robust-prune") as raised:
        claim(tmp_path, "key", "robust-prune")
    assert "\n" not in str(raised.value)
