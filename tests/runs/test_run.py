"""A run folder is one run's, and a stage is done once."""

from __future__ import annotations

import pytest

from robust_prune.compression import Length
from robust_prune.errors import UsageError
from robust_prune.runs.run import Run, claim


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, "key", "robust-prune")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"not a run folder and holds model\.safetensors, which a run would overwrite"):
        claim(other, "key", "robust-prune")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UsageError, match="holds a run with another model"):
        claim(tmp_path, "key", "robust-prune")


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


def test_a_run_of_an_older_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"key": "key", "command": "robust-prune"}')
    with pytest.raises(UsageError, match="holds a run of another version of robust-prune") as raised:
        claim(tmp_path, "key", "robust-prune")
    assert "\n" not in str(raised.value)
