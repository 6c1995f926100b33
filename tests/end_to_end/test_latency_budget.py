"""Whole runs under a budget in latency_search."""

from __future__ import annotations

import json

import pytest
from builders.toy import QUICK, write_data, write_model

from robust_prune import cli
from robust_prune.bench.candidates import CandidateClock
from robust_prune.budget import latency_search
from robust_prune.budget.counting import count_macs
from robust_prune.budget.latency_search import TOLERANCE
from robust_prune.models import registry


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_whole_run_lands_on_a_latency(tmp_path, monkeypatch, capsys, cuts):
    """The clock is exchanged for one that knows MACs, so that the outcome can be told exactly."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)

    def kept(clock, model):
        image, dense = clock.spec.blank_image(), registry.build(clock.spec)
        return 0.1 + 0.9 * count_macs(model.cpu(), image) / count_macs(dense, image)

    monkeypatch.setattr(CandidateClock, "kept", kept)
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.4", "--metric",
         "latency", "--cuts", str(cuts), "--epochs", "1", "--out", "run", "--set", "pruning.round_to=1", *QUICK]
    )  # fmt: skip
    told = capsys.readouterr().out
    assert "of the dense latency (batch 1, 1 thread, cpu)" in told and "of the MACs removed:" in told
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    dense, pruned = result["models"]
    assert 0.1 + 0.9 * pruned["macs"] / dense["macs"] == pytest.approx(0.6, rel=TOLERANCE)
    assert result["plan"]["metric"] == "latency" and result["plan"]["ratio"] == 0.4 and result["plan"]["note"] == ""
    assert "40 % of the latency removed" in result["title"]


def test_a_latency_that_cannot_be_had_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    monkeypatch.setattr(CandidateClock, "kept", lambda *_: 0.9)
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.5", "--metric",
         "latency", "--dry-run", *QUICK]
    )  # fmt: skip
    told = " ".join(capsys.readouterr().out.split())
    assert "asked for 50.0% of the dense latency (batch 1, 1 thread, cpu), the nearest that was found is 90.0%" in told


def test_the_real_clock_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency_search, "MOST_CANDIDATES", 2)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.3", "--metric",
         "latency", "--dry-run", *QUICK]
    )  # fmt: skip
    assert "of the MACs removed:" in capsys.readouterr().out
