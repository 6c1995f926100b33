"""A user's own loss trains, resumes and is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.training_sample import THREAT, Killed, batch_of, make_images, make_model, make_settings, weights_of
from builders.users_loss import LOSSES_FILE
from torch import Tensor

from robust_prune.errors import UsageError
from robust_prune.training import trainer
from robust_prune.training.losses import LossResult, make_loss, users_loss
from robust_prune.training.trainer import train


def test_a_users_loss_trains_resumes_and_is_part_of_the_key(mine: Path, tmp_path: Path, monkeypatch) -> None:
    settings = make_settings(loss=f"{mine}:margin", epochs=3)
    whole = make_model()
    result = train(whole, make_images(96), make_images(30, 1), THREAT, settings)
    assert result.history[-1].val_robust > 0.6
    calls = [0]
    step = trainer._Run._step

    def dying(run: trainer._Run, x: Tensor, y: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 9:
            raise Killed
        step(run, x, y)

    monkeypatch.setattr(trainer._Run, "_step", dying)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    resumed, checkpoint = make_model(), tmp_path / "checkpoint.pt"
    arguments = (make_images(96), make_images(30, 1), THREAT, settings)
    with pytest.raises(Killed):
        train(resumed, *arguments, checkpoint=checkpoint)
    resumed = make_model()
    train(resumed, *arguments, checkpoint=checkpoint)
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(resumed).items())
    mine.write_text(LOSSES_FILE + "\n# changed\n", encoding="utf-8")
    run = trainer._Run(
        make_model(), *arguments, 0, trainer.make_accelerator(settings, "cpu", tmp_path), checkpoint, None
    )
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
        users_loss(f"{mine}:{function}")(make_model(), batch_of(make_model()))


def test_a_scalar_is_enough(mine: Path) -> None:
    model = make_model()
    assert isinstance(users_loss(f"{mine}:scalar")(model, batch_of(model)), LossResult)
    with pytest.raises(UsageError, match="does not exist"):
        make_loss(make_settings(loss="absent.py:loss"))
