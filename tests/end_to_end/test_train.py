"""Training from scratch, and what one does with its model."""

from __future__ import annotations

import json
import time
from pathlib import Path

from builders.toy import write_data, write_model

from robust_prune import cli


def test_train_then_sensitivity_evaluate_export_and_bench(here, capsys):
    write_data(here / "toy.npz")
    write_model(here)
    train = [
        "train", "--arch", "model.py:make_model", "--data", "toy.npz", "--epochs", "2", "--loss", "pgd_at",
        "--set", "training.steps=2", "--set", "training.batch_size=32", "--set", "training.validation_images=30",
        "--set", "evaluation.steps=3", "--set", "threat.epsilon=4/255", "--out", "base",
    ]  # fmt: skip
    cli.main(train)
    result = json.loads((here / "base" / "result.json").read_text())
    assert len(result["history"]) == 2 and result["models"][0]["card"]["clean"]["total"] == 60
    begin = time.monotonic()
    assert "\nFinished in " in capsys.readouterr().out
    cli.main(train)
    assert time.monotonic() - begin < 60
    again = capsys.readouterr().out
    assert "[3/4] Evaluation on test images (from an earlier run)" in again
    assert "\nAlready done: nothing was computed (finished in " in again
    assert "Next: robust-prune compress base/model.safetensors --data toy.npz --arch model.py:make_model" in again
    assert json.loads((here / "base" / "result.json").read_text())["models"] == result["models"]

    common = ["base/model.safetensors", "--arch", "model.py:make_model", "--data", "toy.npz"]
    cli.main(["sensitivity", *common, "--set", "sensitivity.images=60", "--out", "s"])
    profile = json.loads((here / "s" / "sensitivity.json").read_text())
    assert {m["name"] for m in profile["modules"]} >= {"backbone.stem.0", "backbone.head"}

    cli.main(["export", *common, "--out", "base.onnx"])
    capsys.readouterr()
    cli.main(["evaluate", *common, "--onnx", "base.onnx", "--steps", "3", "--epsilon", "4/255", "--out", "card.json"])
    text = capsys.readouterr().out
    assert "robust (pgd)" in text and "ONNX robust" in text
    card = json.loads((here / "card.json").read_text())
    assert card["clean"]["correct"] == result["models"][0]["card"]["clean"]["correct"]

    cli.main(["bench", "base.onnx", "base.onnx", "--seconds", "0.3", "--kind", "host,device", "--out", "bench.json"])
    rows = json.loads((here / "bench.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["host", "host", "device", "device"]
    assert rows[1]["speedup"] is not None and rows[3]["memory_mib"] > 0


def test_the_command_takes_a_users_loss(here: Path, mine: Path) -> None:
    write_data(here / "toy.npz")
    write_model(here)
    cli.main(
        ["train", "--arch", "model.py:make_model", "--data", "toy.npz", "--loss", f"{mine}:margin", "--epochs", "1",
         "--images", "16", "--out", "run"]
    )  # fmt: skip
    assert json.loads((here / "run" / "result.json").read_text())["recipe"]["training"]["loss"] == f"{mine}:margin"
    assert (here / "run" / "model.safetensors").is_file()
