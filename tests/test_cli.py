"""The commands as a user types them: whole runs on a toy, and every way to get them wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import QUICK, write_data, write_model

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

STAGES = ("analyse", "apply", "train", "export_model", "evaluate", "run_section")
"""What the stages of `compress` call to do their work."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _fails(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr().err


def _compress(out: str, *more: str) -> None:
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.5",
         "--epochs", "1", "--out", out, *QUICK, *more]
    )  # fmt: skip


def test_a_users_own_model_file_goes_all_the_way(here, capsys, monkeypatch):
    write_data(here / "toy.npz")
    write_model(here)
    _compress("run")
    text = capsys.readouterr().out
    assert "dense" in text and "pruned" in text and "report.html" in text
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
    for name in STAGES:
        monkeypatch.setattr(compression, name, lambda *_, name=name, **__: pytest.fail(f"{name} ran again"))
    _compress("run")
    assert json.loads((folder / "result.json").read_text())["models"] == result["models"]

    # So does one for its folder at another place, and the files are those there.
    folder.rename("moved")
    _compress("moved")
    again = json.loads(Path("moved/result.json").read_text())["models"]
    assert [model["onnx"]["path"] for model in again] == ["moved/dense.onnx", "moved/model.onnx"]
    Path("moved").rename(folder)
    _compress("run")

    # Other inputs do not overwrite these results.
    code, message = _fails(
        capsys, "compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.3",
        "--out", "run", *QUICK,
    )  # fmt: skip
    assert code == 2 and "run holds a run with another model, data, recipe" in message
    assert json.loads((folder / "result.json").read_text())["models"] == result["models"]


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

    _compress("whole", "--seed", "1")
    monkeypatch.setattr(compression, stage, interrupted)
    with pytest.raises(SystemExit) as stop:
        _compress("broken", "--seed", "1")
    assert stop.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (here / "broken" / "result.json").exists()
    _compress("broken", "--seed", "1")
    whole, broken = (json.loads((here / name / "result.json").read_text()) for name in ("whole", "broken"))
    assert broken["plan"] == whole["plan"]
    for before, after in zip(whole["models"], broken["models"], strict=True):
        assert after["card"]["clean"] == before["card"]["clean"]
        assert after["card"]["robust"] == before["card"]["robust"]
        assert after["onnx"]["sha256"] == before["onnx"]["sha256"]


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
        _compress("run", "--cuts", "2")
    _compress("run", "--cuts", "2")
    # The recovery after the first cut was kept; the models shrink from cut to cut.
    assert len(calls) == 3 and calls[0] > calls[1] == calls[2]
    result = json.loads((here / "run" / "result.json").read_text())
    dense, pruned = result["models"]
    assert abs(pruned["macs"] / dense["macs"] - 0.5) <= 0.01
    assert result["plan"]["macs_before"] == dense["macs"] and result["plan"]["macs_after"] == pruned["macs"]

    from robust_prune.models.artifact import load

    weights = load(here / "run" / "model.safetensors", arch="model.py:make_model").module.state_dict()
    for group in result["plan"]["groups"]:
        assert len(weights[f"{group['name']}.weight"]) == group["channels"] - len(group["removed"])
    capsys.readouterr()
    _compress("again", "--cuts", "3", "--dry-run")
    assert "first of 3 cuts" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_touches_nothing(here, capsys):
    write_data(here / "toy.npz")
    write_model(here)
    before = sorted(here.rglob("*"))
    _compress("run", "--dry-run")
    text = capsys.readouterr().out
    assert "MACs" in text and "Dry run: nothing was written." in text
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == before


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
    "ratio word": (
        ["compress", "weights.pt", "--data", "toy.npz", "--ratio", "half"],
        "ratio must be in (0, 1), got half. Try 0.5.",
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
    "copy over": (["recipes", "cp", "demo", "toy.npz"], "exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_end_in_one_line_and_leave_nothing(here, capsys, case):
    write_data(here / "toy.npz", 60, 9)
    write_model(here)
    (here / "model.pt").write_text("this is no model\n")
    (here / "empty.pt").touch()
    (here / "folder").mkdir()
    (here / "bad.yaml").write_text("pruning: {speed: 3}\n")
    before = sorted(here.rglob("*"))
    arguments, wanted = BAD[case]
    code, message = _fails(capsys, *arguments)
    assert code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert wanted in message
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == before


def test_cuda_without_a_gpu_is_an_environment_error(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, message = _fails(capsys, "compress", "demo", "--device", "cuda")
    assert code == 3 and "no CUDA device" in message


def test_a_gpu_provider_without_a_gpu_is_refused_before_any_work(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, message = _fails(capsys, "compress", "demo", "--set", "bench.provider=cuda", "--out", "run")
    assert code == 3 and "provider cuda was asked for" in message and not (here / "run").exists()


def test_too_few_images_to_check_an_export_on_are_refused_before_any_work(here, capsys):
    write_data(here / "toy.npz", train=6)
    code, weights = write_model(here)
    asked = ["compress", str(weights), "--arch", f"{code}:make_model", "--data", "toy.npz", "--out", "run"]
    status, message = _fails(capsys, *asked)
    assert status == 2 and "leaves 5 training images" in message and "at least 9" in message
    assert not (here / "run").exists()


def test_a_recovery_preset_stands_over_the_recipe_and_under_the_flags(here, monkeypatch):
    seen = []
    monkeypatch.setattr(compression, "compress", lambda job: seen.append(job.recipe.finetune))
    for more in ([], ["--recovery", "best"], ["--recovery", "best", "--epochs", "2", "--set", "finetune.awp=0"]):
        cli.main(["compress", "demo", "--out", "run", *more])
    of_the_recipe, best, mixed = seen
    assert of_the_recipe.loss == "n_fgsm" and best.loss == mixed.loss == "pgd_at"
    assert best.lr == of_the_recipe.lr and best.epochs > of_the_recipe.epochs
    assert (mixed.epochs, mixed.awp, best.awp > 0) == (2, 0, True)


def test_an_unknown_recovery_is_refused(here, capsys):
    code, message = _fails(capsys, "compress", "demo", "--recovery", "fast")
    assert code == 2 and "recovery" in message and "quick" in message


def test_help_names_every_criterion(capsys):
    from robust_prune.catalogue import ALLOCATIONS, CRITERIA

    cli.main(["compress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in (*CRITERIA.names, *ALLOCATIONS.names))


def test_debug_shows_the_traceback(here):
    with pytest.raises(Exception, match="does not exist"):
        cli.main(["compress", "nowhere.pt", "--data", "sample", "--debug"])


def test_help_answers_without_importing_the_heavy_packages():
    code = (
        "import sys\nfrom robust_prune import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torch_pruning', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for verb in ("compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor", "recipes"):
        assert verb in ran.stdout


@pytest.mark.parametrize("verb", ["compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor"])
def test_every_verb_has_help(verb, capsys):
    cli.main([verb, "--help"])
    assert f"robust-prune {verb}" in capsys.readouterr().out


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
    cli.main(train)
    assert time.monotonic() - begin < 60
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


def test_recipes_are_listed_shown_and_copied(here, capsys):
    cli.main(["recipes", "ls"])
    assert "demo" in capsys.readouterr().out
    cli.main(["recipes", "show", "demo"])
    assert "robust-prune compress demo" in capsys.readouterr().out
    cli.main(["recipes", "show", "demo", "--resolved"])
    assert "min_keep" in capsys.readouterr().out
    cli.main(["recipes", "cp", "demo", "mine.yaml"])
    assert (here / "mine.yaml").exists()


def test_an_unwritable_out_is_refused_in_one_line(here, capsys):
    if os.geteuid() == 0:
        target = "/proc/nothing/run"
    else:
        locked = here / "locked"
        locked.mkdir(mode=0o500)
        target = str(locked / "run")
    write_data(here / "toy.npz")
    write_model(here)
    code, message = _fails(
        capsys, "compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--out", target
    )
    assert code == 3 and "cannot write" in message and message.count("\n") == 1


def test_the_package_list_is_complete():
    import tomllib

    root = Path(cli.__file__).parent.parent
    project = root / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source checkout")
    listed = set(tomllib.loads(project.read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(root).parts) for p in (root / "robust_prune").rglob("*.py")}
    assert listed == found | {"robust_prune.recipes", "robust_prune.data.sample"}


def test_the_demo_goes_with_any_recipe():
    from robust_prune.commands.common import open_model_for
    from robust_prune.recipe_reader import load

    recipe = load(None, {"model.arch": "cifar/resnet18"})
    assert open_model_for("demo", None, recipe, None).spec.arch == "cifar/resnet20_x2"
