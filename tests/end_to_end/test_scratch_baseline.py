"""The small network from scratch beside the cut."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from builders.toy import QUICK, write_data, write_model

from robust_prune import cli


def test_compress_shows_the_network_from_scratch_and_resumes_its_length(tmp_path: Path, capsys) -> None:
    data, (source, weights) = write_data(tmp_path / "data.npz"), write_model(tmp_path)
    out = tmp_path / "run"
    command = [
        "compress", str(weights), "--arch", f"{source}:make_model", "--data", str(data), "--ratio", "0.5",
        "--epochs", "2", "--baseline", "scratch", "--out", str(out), *QUICK,
        "--set", "training.batch_size=32", "--set", "training.validation_images=30", "--set", "baseline.minutes=0.02",
    ]  # fmt: skip
    cli.main(command)
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    labels = {model["label"]: model for model in result["models"]}
    assert list(labels) == ["dense", "pruned", "scratch"]
    assert labels["scratch"]["macs"] == labels["pruned"]["macs"] < labels["dense"]["macs"]
    assert "scratch" in printed and "from fresh weights, trained by n_fgsm for" in " ".join(printed.split())
    length = json.loads((out / "scratch-length" / "stage.json").read_text())
    (out / "scratch" / "stage.json").unlink()
    first = torch.load(out / "scratch" / "checkpoint.pt", weights_only=True)["key"]
    cli.main(command)
    assert json.loads((out / "scratch-length" / "stage.json").read_text()) == length
    assert torch.load(out / "scratch" / "checkpoint.pt", weights_only=True)["key"] == first
    assert "starts over" not in capsys.readouterr().out
