"""Nothing of a stranger runs, and nothing that changed goes unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders.commands import compress, fails
from builders.model_files import rewrite
from builders.toy import QUICK, write_data, write_model

from robust_prune import cli
from robust_prune.evaluation.state import Counters, EvalState, read_state
from robust_prune.models import artifact

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("RAN").touch()
from torch import nn

def make(num_classes=10, in_chans=3, **kw):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, num_classes))

def loss(*args, **kw):
    return None
"""
CODE_KEYS = ("model.arch", "training.loss", "finetune.loss", "pruning.criterion", "pruning.allocation",
             "evaluation.tier")  # fmt: skip
VERBS = {
    "compress": ["compress", "run/model.safetensors", "--data", "toy.npz", *QUICK],
    "frontier": ["frontier", "run/model.safetensors", "--data", "toy.npz", "--ratio", "0.5", *QUICK],
    "cache": ["cache", "ls", "--cache", "run"],
    "train": ["train", "--data", "toy.npz", "--arch", "cifar/resnet20_x0.25", "--epochs", "1", "--out", "new"],
    "sensitivity": ["sensitivity", "run/model.safetensors", "--data", "toy.npz"],
    "evaluate": ["evaluate", "run/model.safetensors", "--data", "toy.npz"],
    "export": ["export", "run/model.safetensors", "--data", "toy.npz", "--out", "new.onnx"],
    "bench": ["bench", "run/model.onnx"],
    "report": ["report", "run"],
    "verify": ["verify", "run"],
    "doctor": ["doctor"],
    "recipes": ["recipes", "show", "evil.yaml", "--resolved"],
}
TAKE_RECIPES = ("compress", "frontier", "train", "sensitivity", "evaluate", "export")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own model and a finished run of it."""
    folder = tmp_path_factory.mktemp("user")
    write_data(folder / "toy.npz")
    write_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compress("run")
    return folder


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    """A copy of the run, beside its model and data."""
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return here / "run"


def planted(run: Path, file: Path, *, seal: bool) -> None:
    """Make a model file of the run name a stranger's code."""
    (run / "evil.py").write_text(EVIL)

    def edit(manifest: dict[str, dict[str, object]], _: object) -> None:
        manifest["spec"].update(arch=f"{run}/evil.py:make", source_sha256="")

    rewrite(file, edit, seal=seal)


def test_no_verb_runs_code_of_a_strangers_folder_model_or_recipe(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(VERBS) == {name for name in cli.app if not name.startswith("-")}, "a new verb needs a row in VERBS"
    files = sorted(run.rglob("*.safetensors"))
    for seal in (True, False):
        stranger = here / f"stranger{seal}"
        shutil.copytree(run, stranger)
        for file in files:
            planted(stranger, stranger / file.relative_to(run), seal=seal)
        for verb, arguments in VERBS.items():
            if not seal and verb not in ("evaluate", "compress"):
                continue  # broken seals are refused by the one door through which all verbs open models
            with_stranger = [part.replace("run/", f"{stranger.name}/") for part in arguments]
            with_stranger = [stranger.name if part == "run" else part for part in with_stranger]
            try:
                cli.main(with_stranger)
            except SystemExit as stop:
                assert stop.code in (2, 3, 4), (verb, capsys.readouterr().err)
            assert not (stranger / "RAN").exists(), verb
    # The user's own command once more, in the stranger's folder: the files are found changed and made again.
    stranger = here / "strangerTrue"
    compress(stranger.name)
    assert not (stranger / "RAN").exists()
    own = artifact.load(stranger / "model.safetensors", arch="model.py:make_model")
    assert own.spec.arch.startswith("model.py")
    (here / "evil.py").write_text(EVIL)
    for key in CODE_KEYS:
        section, _, name = key.partition(".")
        (here / "evil.yaml").write_text(f"{section}: {{{name}: 'evil.py:loss'}}\n")
        for verb in TAKE_RECIPES:
            if (key, verb) == ("model.arch", "train"):
                continue  # the flag --arch chooses another one
            code, said = fails(capsys, *VERBS[verb], "--recipe", "evil.yaml")
            assert code == 2 and f"the recipe names code that would run: {key} is 'evil.py:loss'" in said
        assert not (here / "RAN").exists()


def test_verify_says_what_changed(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", "run", "--arch", "model.py:make_model", "--images", "40"]
    cli.main(command)
    said = capsys.readouterr().out
    assert "records and files of the stages are as they were written" in said
    assert said.count("40 of 40 images as in the run's evaluation") == 2
    code, said = fails(capsys, "verify", "nothing")
    assert code == 2 and "nothing is not a run folder" in said
    onnx = (run / "model.onnx").read_bytes()
    (run / "model.onnx").write_bytes(onnx[:-1] + bytes([onnx[-1] ^ 1]))
    assert fails(capsys, *command) == (4, "error: run/model.onnx is damaged or was changed.\n")
    (run / "model.onnx").unlink()
    assert fails(capsys, *command) == (4, "error: run/model.onnx is missing.\n")
    (run / "model.onnx").write_bytes(onnx)
    report = (run / "report.html").read_bytes()
    (run / "report.html").write_bytes(b"")
    assert fails(capsys, *command) == (4, "error: run/report.html is damaged or was changed.\n")
    (run / "report.html").write_bytes(report)
    record = run / "plan" / "stage.json"
    text = record.read_text()
    record.write_text(text.replace('"seconds"', '"second"'))
    assert fails(capsys, *command) == (4, "error: run/plan/stage.json is damaged or was changed.\n")
    record.write_text(text)
    # Whoever writes the folder can write its hashes, but not what the model answers.
    state, mark = run / "evaluate-pruned" / "state.npz", run / "evaluate-pruned" / "stage.json"
    counters, arrays = read_state(state)
    key = counters.pop("key")
    EvalState(key, counters=Counters(**counters), **(arrays | {"clean": ~arrays["clean"]})).save(state)
    code, said = fails(capsys, *command)
    assert code == 4 and "evaluate-pruned/state.npz is damaged or was changed" in said
    from robust_prune.runs.files import file_sha256
    from robust_prune.runs.run import sealed

    value = json.loads(mark.read_text())
    value["files"]["evaluate-pruned/state.npz"] = file_sha256(state)
    mark.write_text(json.dumps(sealed(value)))
    code, said = fails(capsys, *command)
    assert code == 4 and "model.safetensors classifies 40 of 40 test images otherwise" in said
