"""An interrupted run goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.commands import STAGES, compress
from builders.toy import write_data, write_model


def test_a_run_that_is_interrupted_at_every_call_of_a_stage_ends_the_same(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(here / "toy.npz")
    write_model(here)
    torch.set_num_threads(1)
    # Timing would choose the layout, and that the bits; the cache would know what the whole run measured.
    fixed = ("--seed", "1", "--set", "finetune.precision=fp32", "--cache", "none")
    compress("whole", *fixed)
    returned: Counter[str] = Counter()
    interrupted: list[tuple[str, int]] = []

    def interrupting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if (name, returned[name]) not in interrupted:
                interrupted.append((name, returned[name]))
                raise KeyboardInterrupt
            outcome = real(*arguments, **keywords)
            returned[name] += 1
            return outcome

        return run

    for name, owner in STAGES.items():
        monkeypatch.setattr(owner, name, interrupting(name, getattr(owner, name)))
    for _ in range(20):
        try:
            compress("broken", *fixed)
            break
        except SystemExit as stop:
            assert stop.code == 130 and "run the same command again" in capsys.readouterr().err
            assert not (here / "broken" / "result.json").exists()
    assert interrupted == [
        ("preflight", 0), ("export_model", 0), ("analyse", 0), ("apply", 0), ("train", 0),
        ("export_model", 1), ("evaluate", 0), ("evaluate", 1), ("run_section", 0),
    ]  # fmt: skip
    assert returned.pop("preflight") == 1
    assert returned == {"analyse": 1, "apply": 1, "evaluate": 2, "train": 1, "export_model": 2, "run_section": 1}
    whole, broken = (json.loads((here / name / "result.json").read_text()) for name in ("whole", "broken"))
    assert broken["plan"] == whole["plan"]
    for before, after in zip(whole["models"], broken["models"], strict=True):
        assert after["card"]["clean"] == before["card"]["clean"]
        assert after["card"]["robust"] == before["card"]["robust"]
        assert after["onnx"]["sha256"] == before["onnx"]["sha256"]
