"""A run folder is one run's, and a stage is done once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from robust_prune import __version__
from robust_prune.errors import UsageError
from robust_prune.job import Length
from robust_prune.recipe import Recipe
from robust_prune.recipe_reader import load
from robust_prune.runs import audit
from robust_prune.runs import run as runs
from robust_prune.runs.files import read_json
from robust_prune.runs.run import Run, RunInputs, claim

INPUTS = RunInputs.of("model", ["images"], {"seed": 0}, [])


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, INPUTS, "robust-prune")
    for number, name in enumerate(("model.safetensors", "dense.onnx", "scratch.onnx", "model.int8.onnx")):
        other = tmp_path / f"other{number}"
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(UsageError, match=f"not a run folder and holds {name}, which a run would overwrite"):
            claim(other, INPUTS, "robust-prune")
    for changed, words in (({"model": "b"}, "model"), ({"data": "b", "version": "0"}, "data and another version")):
        with pytest.raises(UsageError, match=f"holds a run with another {words}. Name another folder"):
            claim(tmp_path, replace(INPUTS, **changed), "robust-prune")
    for damaged in ("[]", "{}"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"run\.json is damaged"):
            claim(tmp_path, INPUTS, "robust-prune")


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


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "one.bin").write_bytes(b"two"), "one.bin is damaged or was changed"),
        (lambda folder: (folder / "one.bin").unlink(), "one.bin is missing"),
        (lambda folder: (folder / "one" / "stage.json").write_text("{"), "stage.json is damaged"),
        (
            lambda folder: (folder / "one" / "stage.json").write_text(
                (folder / "one" / "stage.json").read_text().replace('"epochs": 5', '"epochs": 6')
            ),
            "stage.json is damaged or was changed",
        ),
    ],
)
def test_damage_is_said_and_the_stage_and_those_after_it_are_done_again(tmp_path, capsys, damage, words):
    made = []

    def go():
        run = Run(tmp_path, "key", stages={"zero": "Zero", "one": "One", "two": "Two"})
        for name in run.stages:
            file = tmp_path / f"{name}.bin"
            run.stage(name, Length, [], lambda name=name, file=file: made.append(name) or write(file), files=[file])
        return run.made

    def write(file):
        file.write_bytes(b"one")
        return Length(5, 1)

    assert (go(), go()) == (["zero", "one", "two"], [])
    damage(tmp_path)
    capsys.readouterr()
    assert go() == ["one", "two"]
    said = f"{words}. This stage and those after it are done again."
    assert "".join(said.split()) in "".join(capsys.readouterr().out.split())  # a long path is folded anywhere
    assert go() == []


def test_a_run_of_an_older_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"key": "key", "command": "robust-prune"}')
    with pytest.raises(UsageError, match="holds a run of another version of robust-prune") as raised:
        claim(tmp_path, INPUTS, "robust-prune")
    assert "\n" not in str(raised.value)


def test_the_time_of_a_stage_is_that_of_the_run_that_did_the_work(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def make():
        now[0] += 7.5
        return Length(5, 1)

    for run in (Run(tmp_path, "key"), Run(tmp_path, "key")):
        run.stage("cut", Length, [], make)
        assert run.seconds == {"cut": 7.5}


def test_a_fresh_outcome_is_the_one_that_a_later_run_reads(tmp_path):
    """Whatever JSON makes of it: a resumed run must not differ from one that never stopped."""
    run, made = Run(tmp_path, "key"), Length(5, 1)
    fresh, stored = (run.stage("length", Length, [], lambda: made) for _ in range(2))
    assert fresh == stored == made and fresh is not made


def test_the_record_of_one_stage_is_not_taken_for_another(tmp_path):
    run = Run(tmp_path, "key")
    run.stage("one", Length, [1], lambda: Length(5, 1))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run.stage("two", Length, [1], lambda: Length(6, 1)) == Length(6, 1)


def test_the_key_of_a_run_holds_its_inputs_and_the_versions(monkeypatch):
    key = INPUTS.key
    assert key == replace(INPUTS).key != RunInputs.of("model", ["others"], {}, []).key
    for name, value in (("FORMAT", 99),):
        with monkeypatch.context() as patch:
            patch.setattr(runs, name, value)
            assert INPUTS.key != key
    assert replace(INPUTS, version="99.0").key != key


def test_an_opened_folder_holds_the_recipe_the_machine_and_the_command_and_is_kept_for_its_run(tmp_path):
    recipe = load(None, {"pruning.ratio": 0.25})
    with Run.open(tmp_path / "run", INPUTS, recipe, "robust-prune compress"):
        pass
    assert load(str(tmp_path / "run" / "recipe.yaml")) == recipe
    assert read_json(tmp_path / "run" / "environment.json")["robust_prune"] == __version__
    assert read_json(tmp_path / "run" / "run.json")["command"] == "robust-prune compress"
    with Run.open(tmp_path / "run", INPUTS, recipe, "the same again"):
        pass
    with pytest.raises(UsageError, match=r"run holds a run with another recipe"):
        Run.open(tmp_path / "run", replace(INPUTS, recipe="other"), recipe, "robust-prune compress")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is a file\. Name a folder"):
        Run.open(tmp_path / "file", INPUTS, recipe, "robust-prune compress")


def test_a_refused_run_leaves_no_trace_but_a_resumed_one_stays(tmp_path):
    folder = tmp_path / "run"

    def begin(error=None):
        with (
            Run.open(folder, INPUTS, load("demo"), "robust-prune") as run,
            run.refusable(folder / "dense.onnx"),
        ):
            run.stage("preflight", Length, [], lambda: Length(5, 1))
            (folder / "dense.onnx").touch()
            if error:
                raise error

    with pytest.raises(UsageError, match="no"):
        begin(UsageError("no"))
    assert not folder.exists()
    with pytest.raises(KeyError):
        begin(KeyError())
    assert (folder / "run.json").exists()
    with pytest.raises(UsageError, match="later"):
        begin(UsageError("later"))
    assert (folder / "run.json").exists() and (folder / "preflight" / "stage.json").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").touch()
    with (
        pytest.raises(UsageError, match="no"),
        Run.open(other, INPUTS, load("demo"), "robust-prune") as run,
        run.refusable(),
    ):
        raise UsageError("no")
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_second_process_is_told_who_works_in_the_folder_and_a_dead_one_holds_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from robust_prune.runs.run import Run, RunInputs\n"
        "from robust_prune.recipe import Recipe\n"
        "run = Run.open(Path(sys.argv[1]), RunInputs.of('model', ['images'], {'seed': 0}, []), Recipe(), 'x')\n"
        "print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"open\n"
    left = tmp_path / "train"
    left.mkdir()
    (left / ".checkpoint.pt.abcdefgh.part").write_text("half")
    with pytest.raises(UsageError, match=rf"another process works in .* \(process {other.pid} on ") as raised:
        Run.open(tmp_path, INPUTS, Recipe(), "x")
    assert "\n" not in str(raised.value) and (left / ".checkpoint.pt.abcdefgh.part").exists()
    other.kill()
    other.wait()
    with Run.open(tmp_path, INPUTS, Recipe(), "x"):
        assert list(left.iterdir()) == []
    with Run.open(tmp_path, INPUTS, Recipe(), "x"):
        pass


def test_a_folder_with_links_is_refused_and_what_they_lead_to_stays(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    for link in ("environment.json", "evaluate/state.npz", "evaluate"):
        folder = tmp_path / "run"
        Run.open(folder, INPUTS, Recipe(), "").lock.release()
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(mine)
        with pytest.raises(UsageError, match=rf"{link} is a link, and a run writes to no files elsewhere\. Remove it"):
            Run.open(folder, INPUTS, Recipe(), "")
        assert mine.read_text() == "mine"
        shutil.rmtree(folder)


def test_only_the_temporary_files_of_the_run_itself_are_removed(tmp_path):
    other = tmp_path / "runs" / "half"
    Run.open(other, INPUTS, Recipe(), "").lock.release()
    kept = [
        other / ".model.onnx.ab12cd34.part",
        tmp_path / "runs" / "a" / "b" / ".x.part",
        tmp_path / "runs" / ".a.part",
    ]
    gone = [tmp_path / "runs" / ".run.json.abcd3_45.part", tmp_path / "runs" / "prune" / ".model.k2j3h4_5.part"]
    for part in (*kept[:2], *gone):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("x")
    kept[2].mkdir()
    Run.open(tmp_path / "runs", INPUTS, Recipe(), "").lock.release()
    assert all(part.exists() for part in kept) and not any(part.exists() for part in gone)


def test_a_stage_does_not_go_on_from_a_file_that_was_changed(tmp_path):
    progress = tmp_path / "progress"

    def make():
        found = progress.exists()
        progress.write_text("made")
        return Length(5, 1 if found else 0)

    for text in ("made", "changed"):
        run = Run(tmp_path, "key")
        progress.write_text(text) if text == "changed" else None
        assert run.stage("attack", Length, [], make, files=[progress]) == Length(5, 0)


def test_a_stage_is_not_stored_when_what_it_depends_on_has_changed_meanwhile(tmp_path):
    def check():
        raise UsageError("loss.py was changed")

    with pytest.raises(UsageError, match=r"loss\.py was changed"):
        Run(tmp_path, "key", check=check).stage("cut", Length, [], lambda: Length(5, 1))
    assert not (tmp_path / "cut" / "stage.json").exists()


@pytest.mark.parametrize("change", [{"seconds": 10**400}, {"files": None}, {"value": {}}])
def test_a_record_of_another_form_is_damaged(tmp_path, capsys, change):
    Run(tmp_path, "key").stage("cut", Length, [], lambda: Length(5, 1))
    mark = tmp_path / "cut" / "stage.json"
    mark.write_text(json.dumps(runs.sealed(read_json(mark) | change)))
    assert Run(tmp_path, "key").stage("cut", Length, [], lambda: Length(5, 2)) == Length(5, 2)
    assert "is damaged" in capsys.readouterr().out


def test_deeply_nested_json_is_refused_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"run\.json is not valid JSON"):
        claim(tmp_path, INPUTS, "")


def test_an_audit_reads_nothing_outside_the_folder_and_misses_removed_records(tmp_path):
    run = Run.open(tmp_path / "run", INPUTS, Recipe(), "", {"cut": "Cut", "bench": "Latency"})
    run.stage("cut", Length, [], lambda: Length(5, 1))
    run.lock.release()
    assert audit.damaged(run.folder)[0] == [f"{run.folder}/bench/stage.json is missing"]
    mark = run.folder / "cut" / "stage.json"
    for name in ("/etc/passwd", "../mine"):
        mark.write_text(json.dumps(runs.sealed(read_json(mark) | {"files": {name: "00"}})))
        assert any(f"names {name}, which lies elsewhere" in problem for problem in audit.damaged(run.folder)[0])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
def test_a_pipe_or_an_endless_file_in_place_of_a_record_is_not_read(tmp_path):
    run = Run.open(tmp_path / "run", INPUTS, Recipe(), "")
    run.stage("cut", Length, [], lambda: Length(5, 1))
    mark = run.folder / "cut" / "stage.json"
    mark.unlink()
    os.mkfifo(mark)
    assert Run(run.folder, run.key).stage("bench", Length, [], lambda: Length(5, 2)) == Length(5, 2)
    assert audit.damaged(run.folder)[0] == [f"{mark} is damaged or was changed"]
    assert run._stored(mark, "key", Length, [])[1] == f"{mark} is damaged"
    mark.unlink()
    mark.touch()
    os.truncate(mark, 10**12)
    assert audit.damaged(run.folder)[0] == [f"{mark} is damaged or was changed"]


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "run.json"])
def test_an_audit_finds_what_was_changed_beside_the_stages(tmp_path, name):
    run = Run.open(tmp_path / "run", INPUTS, Recipe(), "", {"cut": "Cut"})
    run.stage("cut", Length, [], lambda: Length(5, 1))
    assert audit.damaged(run.folder)[0] == []
    file = run.folder / name
    file.write_text(file.read_text().replace(INPUTS.model, "0" * 16) if name == "run.json" else "")
    expected = run.folder / "cut" / "stage.json" if name == "run.json" else file
    assert audit.damaged(run.folder)[0] == [f"{expected} is damaged or was changed"]


def test_a_record_of_another_stage_is_found(tmp_path):
    run = Run.open(tmp_path / "run", INPUTS, Recipe(), "", {"cut": "Cut", "bench": "Latency"})
    for name in ("cut", "bench"):
        run.stage(name, Length, [], lambda: Length(5, 1))
    mark = run.folder / "bench" / "stage.json"
    shutil.copyfile(run.folder / "cut" / "stage.json", mark)
    assert audit.damaged(run.folder)[0] == [f"{mark} is damaged or was changed"]
