"""An interrupted run goes on."""

from __future__ import annotations

import json

import pytest
import torch
from builders.commands import STAGES, compress
from builders.toy import write_data, write_model

from robust_prune import compression


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_goes_on_and_ends_the_same(here, capsys, monkeypatch, stage):
    write_data(here / "toy.npz")
    write_model(here)
    torch.set_num_threads(1)
    real = getattr(compression, stage)
    calls = 0

    def interrupted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    compress("whole", "--seed", "1")
    monkeypatch.setattr(compression, stage, interrupted)
    with pytest.raises(SystemExit) as stop:
        compress("broken", "--seed", "1")
    assert stop.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (here / "broken" / "result.json").exists()
    compress("broken", "--seed", "1")
    whole, broken = (json.loads((here / name / "result.json").read_text()) for name in ("whole", "broken"))
    assert broken["plan"] == whole["plan"]
    for before, after in zip(whole["models"], broken["models"], strict=True):
        assert after["card"]["clean"] == before["card"]["clean"]
        assert after["card"]["robust"] == before["card"]["robust"]
        assert after["onnx"]["sha256"] == before["onnx"]["sha256"]
