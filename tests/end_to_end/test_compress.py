"""Whole compressions of a toy, as a user types them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.commands import STAGES, compress, fails
from builders.toy import QUICK, write_data, write_model

from robust_prune import cli, compression

PLAIN_ONNX = """
import sys
for name in ("torch", "robust_prune", "onnx"):
    sys.modules[name] = None
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
images = numpy.load("images.npy")
for batch in (1, 32):
    print(session.run(None, {"images": images[:batch]})[0].tolist())
"""


def test_a_users_own_model_file_goes_all_the_way(here, capsys, monkeypatch):
    write_data(here / "toy.npz")
    write_model(here)
    compress("run")
    text = capsys.readouterr().out
    assert "dense" in text and "pruned" in text and "report.html" in text
    assert "[3/11] Robustness of the dense model\nDense model on " in text and "[10/11] Latency\n" in text
    assert "from an earlier run" not in text and "\nFinished in " in text
    commands = [shlex.split(line)[1:] for line in text.partition("\nNext: ")[2].replace("\n     ", "\n").splitlines()]
    assert [command[0] for command in commands] == ["evaluate", "bench", "report"]
    for command in commands:
        cli.app.parse_args(command, exit_on_error=False, print_error=False)
        assert all(Path(word).exists() for word in command if word.startswith("run/"))
    assert commands[0][:6] == [
        "evaluate",
        "run/model.safetensors",
        "--data",
        "toy.npz",
        "--arch",
        "model.py:make_model",
    ]
    folder = here / "run"
    result = json.loads((folder / "result.json").read_text())
    dense, pruned = result["models"]
    assert abs(pruned["macs"] / dense["macs"] - 0.5) <= 0.01
    assert pruned["params"] < dense["params"]
    assert pruned["card"]["clean"]["total"] == 60
    assert pruned["card"]["robust"]["correct"] <= pruned["card"]["clean"]["correct"]
    assert pruned["onnx"]["parity"]["passed"]
    # The ONNX file itself was scored, and agrees with the torch model about the very same images.
    assert abs(pruned["onnx_clean"]["correct"] - pruned["card"]["clean"]["correct"]) <= 1
    assert {row["batch"] for row in pruned["latency"]} == {1, 4}
    assert all(row["speedup"]["low"] <= row["speedup"]["value"] for row in pruned["latency"])
    assert dense["latency"][0]["speedup"] is None

    # Physically smaller tensors, rebuilt from the file alone.
    from robust_prune.models.artifact import load

    small = load(folder / "model.safetensors", arch="model.py:make_model").module
    assert sum(p.numel() for p in small.parameters()) == pruned["params"]

    # Plain onnxruntime, with neither torch nor this package to be found, at batch 1 and 32.
    import numpy as np

    images = torch.rand(32, 3, 16, 16)
    np.save(folder / "images.npy", images.numpy())
    ran = subprocess.run([sys.executable, "-c", PLAIN_ONNX], cwd=folder, capture_output=True, text=True, check=True)
    one, many = (torch.tensor(json.loads(line)) for line in ran.stdout.splitlines())
    with torch.no_grad():
        assert torch.allclose(many, small.eval()(images), atol=1e-4)
    assert torch.allclose(one, many[:1], atol=1e-5)

    # The same command again finds everything done.
    for name, owner in STAGES.items():
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} ran again"))
    written = (folder / "report.html").stat().st_mtime_ns
    compress("run")
    assert json.loads((folder / "result.json").read_text())["models"] == result["models"]
    assert (folder / "report.html").stat().st_mtime_ns == written
    again = capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line for line in again.splitlines() if line.startswith("|")] == table
    assert again.count("(from an earlier run)") == 11 and "[10/11] Latency (from an earlier run)" in again
    assert "\nAlready done: nothing was computed (finished in " in again and "Finished in" not in again

    # So does one for its folder at another place, and the files are those there.
    folder.rename("moved")
    compress("moved")
    again = json.loads(Path("moved/result.json").read_text())["models"]
    assert [model["onnx"]["path"] for model in again] == ["moved/dense.onnx", "moved/model.onnx"]
    Path("moved").rename(folder)
    compress("run")

    # Other inputs do not overwrite these results.
    code, message = fails(
        capsys, "compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.3",
        "--out", "run", *QUICK,
    )  # fmt: skip
    assert code == 2 and "run holds a run with another recipe." in message
    assert json.loads((folder / "result.json").read_text())["models"] == result["models"]


def test_several_cuts_land_on_the_whole_budget(here, capsys, monkeypatch):
    write_data(here / "toy.npz")
    write_model(here)
    real, calls = compression.train, []

    def interrupted(model, *arguments, **keywords):
        calls.append(sum(p.numel() for p in model.parameters()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, *arguments, **keywords)

    monkeypatch.setattr(compression, "train", interrupted)
    with pytest.raises(SystemExit):
        compress("run", "--cuts", "2")
    capsys.readouterr()
    compress("run", "--cuts", "2")
    text = capsys.readouterr().out
    assert "[3/14] Robustness of the dense model (from an earlier run)\n" in text
    assert "[6/14] Fine-tuning (cut 1 of 2) (from an earlier run)\n" in text
    assert "[9/14] Fine-tuning (cut 2 of 2)\n" in text and "[13/14] Latency\n" in text
    assert "with the stages of earlier runs." in text
    # The recovery after the first cut was kept; the models shrink from cut to cut.
    assert len(calls) == 3 and calls[0] > calls[1] == calls[2]
    result = json.loads((here / "run" / "result.json").read_text())
    dense, pruned = result["models"]
    assert abs(pruned["macs"] / dense["macs"] - 0.5) <= 0.01
    assert result["plan"]["macs_before"] == dense["macs"] and result["plan"]["macs_after"] == pruned["macs"]

    # Sensitivities are those of the dense model, not of what the first cut left.
    first, last = (json.loads((here / "run" / name / "stage.json").read_text())["value"] for name in ("plan-1", "plan"))
    assert result["profile"]["modules"] == first["profile"]["modules"] != last["profile"]["modules"]

    from robust_prune.models.artifact import load

    weights = load(here / "run" / "model.safetensors", arch="model.py:make_model").module.state_dict()
    for group in result["plan"]["groups"]:
        assert len(weights[f"{group['name']}.weight"]) == group["channels"] - len(group["removed"])
    capsys.readouterr()
    compress("again", "--cuts", "3", "--dry-run")
    assert "first of 3 cuts" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_touches_nothing(here, capsys):
    write_data(here / "toy.npz")
    write_model(here)
    before = sorted(here.rglob("*"))
    compress("run", "--dry-run")
    text = capsys.readouterr().out
    assert "MACs" in text and "Dry run: no run folder was written." in text
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == before
