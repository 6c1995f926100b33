"""Every way to get a command wrong ends in one line."""

from __future__ import annotations

import os

import pytest
import torch
from builders.commands import fails
from builders.toy import write_data, write_model

from robust_prune import cli

BAD = {
    "wrong path": (["compress", "nowhere.pt", "--data", "toy.npz"], "nowhere.pt does not exist"),
    "wrong arch": (
        ["compress", "weights.pt", "--arch", "cifar/resnet21", "--data", "toy.npz"],
        "Did you mean cifar/resnet",
    ),
    "other arch": (["compress", "weights.pt", "--arch", "cifar/resnet20", "--data", "toy.npz"], "weights.pt"),
    "no arch": (["compress", "weights.pt", "--data", "toy.npz"], "Add --arch"),
    "ratio": (
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "1.5"],
        "ratio must be in (0, 1), got 1.5. Try 0.5.",
    ),
    "one of two ratios": (["compress", "demo", "--ratio", "0.5,1.5"], "ratio must be in (0, 1), got 1.5. Try 0.5."),
    "ratio and target": (["compress", "demo", "--ratio", "0.5", "--target-macs", "1M"], "Give one of them"),
    "ratio and goal": (
        ["compress", "demo", "--ratio", "0.5", "--max-drop", "2"],
        "--ratio and --max-drop are two budgets",
    ),
    "goal and plan": (["compress", "demo", "--max-drop", "2", "--dry-run"], "--max-drop has no plan before models are"),
    "goal of a frontier": (
        ["frontier", "demo", "--min-robust", "38"],
        "--min-robust is one budget. Give it to compress",
    ),
    "target and metric": (
        ["compress", "demo", "--target-params", "10k", "--metric", "latency"],
        "--target-params says what is counted, and --metric latency too",
    ),
    "two limits": (
        ["compress", "demo", "--limit", "a=0.1", "--limit", "a=0.9"],
        "--limit a was given twice: 0.1 and 0.9",
    ),
    "ratio near 1": (["frontier", "demo", "--ratio", "0.5,0.99999"], "ratios must be from 0.0001 to 0.9999"),
    "unknown home": (
        ["cache", "ls", "--cache", "~nobody-of-that-name/x"],
        "names a user that this machine does not know",
    ),
    "accuracy as a share": (["compress", "demo", "--min-robust", "0.38"], "in percent, got 0.38. Try 38."),
    "two targets": (["compress", "demo", "--target-params", "1k", "--target-macs", "1M"], "Give one of them"),
    "target word": (["compress", "demo", "--target-macs", "few"], "such as 50M, 300k or 1.2G, got 'few'"),
    "target too large": (
        ["compress", "demo", "--target-macs", "1G"],
        "--target-macs 1,000,000,000: the dense model has 162,366,720 MACs. Ask for fewer.",
    ),
    "limit without share": (["compress", "demo", "--limit", "layer4"], "--limit wants LAYER=SHARE"),
    "limit above 1": (["compress", "demo", "--limit", "layer4=2"], "less than or equal to 1, got 2"),
    "unknown layer": (["compress", "demo", "--dry-run", "--keep", "layer9"], "no layer that can be cut fits 'layer9'"),
    "ratio word": (
        ["compress", "weights.pt", "--data", "toy.npz", "--ratio", "half"],
        "ratio must be in (0, 1), got 'half'. Try 0.5.",
    ),
    "unknown key": (["compress", "demo", "--recipe", "bad.yaml"], "unknown recipe key pruning.speed. Known:"),
    "unknown recipe": (["compress", "demo", "--recipe", "dem"], "Did you mean demo?"),
    "no data": (["compress", "weights.pt", "--arch", "model.py:make_model"], "no data given. Add --data cifar10"),
    "wrong data": (["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "cfar10"], "cifar10"),
    "text file": (["compress", "model.pt", "--arch", "model.py:make_model", "--data", "toy.npz"], "model.pt"),
    "empty file": (["compress", "empty.pt", "--arch", "model.py:make_model", "--data", "toy.npz"], "empty.pt"),
    "folder": (["compress", "folder", "--arch", "model.py:make_model", "--data", "toy.npz"], "folder"),
    "unknown flag": (["compress", "demo", "--ration", "0.5"], "--ration"),
    "set without value": (["compress", "demo", "--set", "seed"], "--set wants KEY=VALUE"),
    "unknown criterion": (["compress", "demo", "--dry-run", "--criterion", "magic"], "magic"),
    "unknown tier": (
        ["evaluate", "demo", "--set", "evaluation.tier=strong"],
        "evaluation.tier must be one of aa-fast, apgd",
    ),
    "no batch": (["compress", "demo", "--set", "bench.batches=[0]"], "bench.batches.0"),
    "out is a file": (["compress", "demo", "--out", "toy.npz"], "--out toy.npz is a file"),
    "no verb": (["squeeze"], "squeeze"),
    "bench nothing": (["bench"], "no file given"),
    "bench no onnx": (["bench", "toy.npz"], "toy.npz"),
    "bench batch": (["bench", "model.onnx", "--batch", "0"], "--batch wants numbers from 1"),
    "old opset": (["export", "demo", "--opset", "9"], "greater than or equal to 18, got 9"),
    "train no arch": (["train", "--data", "toy.npz"], "no architecture given"),
    "radius in 255ths": (["evaluate", "demo", "--epsilon", "8"], "got 8. Did you mean 8/255?"),
    "sweep in 255ths": (["evaluate", "demo", "--sweep", "2/255,4"], "evaluation.sweep must be at most 1"),
    "radius of a recipe": (["compress", "demo", "--dry-run", "--set", "threat.epsilon=8"], "Did you mean 8/255?"),
    "radius of a training": (["train", "--arch", "cifar/resnet20", "--data", "sample", "--epsilon", "4"], "4/255?"),
    "radius of sensitivity": (["sensitivity", "demo", "--norm", "linf", "--epsilon", "4"], "4/255?"),
    "radius word": (["evaluate", "demo", "--epsilon", "eight"], "must be a number or a fraction such as 8/255"),
    "l2 alone": (["evaluate", "demo", "--set", "threat.norm=l2"], "norm l2 needs a radius of its own, got none"),
    "l2 and a recipe's radius": (
        ["compress", "demo", "--recipe", "cifar10-resnet18", "--data", "sample", "--norm", "l2"],
        "norm l2 needs a radius of its own",
    ),
    "l2 of a training": (
        ["train", "--arch", "cifar/resnet20", "--data", "sample", "--norm", "l2", "--epsilon", "128"],
        "must be at most 55.43 for l2",
    ),
    "bad tier": (["evaluate", "demo", "--tier", "empty.pt.py:tier"], "empty.pt.py"),
    "sensitivity out": (["sensitivity", "demo", "--out", "toy.npz"], "--out: toy.npz is a file. Name a folder."),
    "export out": (["export", "demo", "--out", "folder"], "--out folder is a folder. Name a file."),
    "export out below a file": (["export", "demo", "--out", "toy.npz/x.onnx"], "--out: toy.npz is a file"),
    "bench out": (["bench", "model.onnx", "--out", "folder"], "--out folder is a folder. Name a file."),
    "report out": (["report", "folder", "--out", "toy.npz"], "--out: toy.npz is a file. Name a folder."),
    "show a binary": (["recipes", "show", "latin.yaml"], "recipe latin.yaml is not UTF-8 text"),
    "run a binary": (["compress", "demo", "--recipe", "latin.yaml"], "recipe latin.yaml is not UTF-8 text"),
    "show a folder": (["recipes", "show", "folder"], "neither a file nor a shipped recipe"),
    "show too long a name": (["recipes", "show", "x" * 5000], "neither a file nor a shipped recipe"),
    "show l2 without radius": (["recipes", "show", "l2.yaml", "--resolved"], "norm l2 needs a radius of its own"),
    "copy below a file": (["recipes", "cp", "demo", "toy.npz/mine.yaml"], "toy.npz is a file"),
    "set a bad date": (["compress", "demo", "--set", "seed=2020-13-45"], "the value is not valid YAML"),
    "copy over": (["recipes", "cp", "demo", "toy.npz"], "exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_end_in_one_line_and_leave_nothing(here, capsys, case):
    write_data(here / "toy.npz", 60, 9)
    write_model(here)
    (here / "model.pt").write_text("this is no model\n")
    (here / "empty.pt").touch()
    (here / "folder").mkdir()
    (here / "latin.yaml").write_bytes(b"# caf\xe9\nseed: 1\n")
    (here / "l2.yaml").write_text("threat: {norm: l2}\n")
    (here / "bad.yaml").write_text("pruning: {speed: 3}\n")
    before = sorted(here.rglob("*"))
    arguments, wanted = BAD[case]
    code, message = fails(capsys, *arguments)
    assert code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert wanted in message
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == before


def test_cuda_without_a_gpu_is_an_environment_error(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, message = fails(capsys, "compress", "demo", "--device", "cuda")
    assert code == 3 and "no CUDA device" in message


def test_a_gpu_provider_without_a_gpu_is_refused_before_any_work(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, message = fails(capsys, "compress", "demo", "--set", "bench.provider=cuda", "--out", "run")
    assert code == 3 and "provider cuda was asked for" in message and not (here / "run").exists()


def test_too_few_images_to_check_an_export_on_are_refused_before_any_work(here, capsys):
    write_data(here / "toy.npz", train=6)
    code, weights = write_model(here)
    asked = ["compress", str(weights), "--arch", f"{code}:make_model", "--data", "toy.npz", "--out", "run"]
    status, message = fails(capsys, *asked)
    assert status == 2 and "leaves 5 training images" in message and "at least 9" in message
    assert not (here / "run").exists()


SIDE_HEAD = """
class Side(Net):
    def forward(self, x):
        out = super().forward(x)
        return (out, out) if self.training else out

def with_side(num_classes=3):
    return Side(num_classes)
"""


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_model_that_training_would_refuse_is_refused_before_any_work(here, capsys, more):
    write_data(here / "toy.npz")
    code, weights = write_model(here)
    code.write_text(code.read_text() + SIDE_HEAD)
    asked = ["compress", str(weights), "--arch", "model.py:with_side", "--data", "toy.npz", "--out", "run", *more]
    status, message = fails(capsys, *asked)
    assert status == 2 and message.startswith("error: in train mode the model returns a tuple of 2 values")
    assert message.count("\n") == 1 and not (here / "run").exists()
    status, message = fails(
        capsys, "train", "--arch", "model.py:with_side", "--data", "toy.npz", "--out", "run", "--epochs", "1"
    )
    assert status == 2 and "in train mode" in message and not (here / "run").exists()


def test_an_unknown_recovery_is_refused(here, capsys):
    code, message = fails(capsys, "compress", "demo", "--recovery", "fast")
    assert code == 2 and "recovery" in message and "quick" in message


def test_debug_shows_the_traceback(here):
    with pytest.raises(Exception, match="does not exist"):
        cli.main(["compress", "nowhere.pt", "--data", "sample", "--debug"])


def test_an_unwritable_out_is_refused_in_one_line(here, capsys):
    if os.geteuid() == 0:
        target = "/proc/nothing/run"
    else:
        locked = here / "locked"
        locked.mkdir(mode=0o500)
        target = str(locked / "run")
    write_data(here / "toy.npz")
    write_model(here)
    code, message = fails(
        capsys, "compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--out", target
    )
    assert code == 3 and "cannot write" in message and message.count("\n") == 1
