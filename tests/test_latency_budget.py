"""Budgets in latency: the search on its own, and whole runs with a clock that tells what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from toy import QUICK, write_data, write_model

from robust_prune import cli
from robust_prune.bench.candidates import CandidateClock, missed
from robust_prune.bench.types import LatencyRow, LatencyTable, Ratio
from robust_prune.budget.counting import count_macs
from robust_prune.budget.latency import AIM, MOST_CANDIDATES, TOLERANCE, Tried, next_share
from robust_prune.models import registry
from robust_prune.recipe import BenchSection


def searched(latency: Callable[[float], float], wanted: float) -> list[Tried]:
    tried = [Tried(0.0, latency(0.0))]
    while (share := next_share(tried, wanted)) is not None:
        tried.append(Tried(share, latency(share)))
    return tried


@pytest.mark.parametrize("wanted", [0.8, 0.5, 0.3])
@pytest.mark.parametrize(
    "latency",
    [lambda r: 1 - r, lambda r: 0.2 + 0.8 * (1 - r), lambda r: (1 - r) ** 2, lambda r: (1 - r) ** 0.6],
    ids=["proportional", "with overhead", "falls fast", "falls slowly"],
)
def test_the_search_lands_in_a_few_candidates(latency: Callable[[float], float], wanted: float) -> None:
    tried = searched(latency, wanted)
    assert min(abs(t.kept / wanted - 1) for t in tried) <= AIM
    assert len(tried) <= MOST_CANDIDATES


def test_the_search_ends_where_nothing_is_fast_enough_or_nothing_lies_between() -> None:
    slow = searched(lambda r: 0.7 + 0.3 * (1 - r), 0.5)
    assert slow[-1].removed > 0.95 and len(slow) <= MOST_CANDIDATES + 1
    steps = searched(lambda r: 1.0 if r < 0.4 else 0.3, 0.5)
    assert {t.kept for t in steps} == {1.0, 0.3} and len(steps) <= MOST_CANDIDATES + 1
    # A noisy clock that contradicts itself is no reason to go on for ever.
    assert next_share([Tried(0, 1), Tried(0.6, 0.7), Tried(0.5, 0.4)], 0.5) is None
    # What earlier cuts left may be fast enough already.
    assert next_share([Tried(0, 0.3)], 0.5) is None


def row(speedup: float, batch: int = 1) -> LatencyRow:
    ratio = Ratio(speedup, speedup, speedup, "faster")
    return LatencyRow("pruned", "m.onnx", "cpu", "host", batch, 1, 64, 1, 1, 1, None, None, None, 1, ratio, False)


def test_the_final_measurement_is_held_against_the_budget() -> None:
    bench = BenchSection(batches=(1, 32))
    table = LatencyTable((row(2.04), row(9.0, batch=32)), {}, {}, "")
    assert missed(table, bench, 0.5) == ""
    late = missed(LatencyTable((row(1.6),), {}, {}, ""), bench, 0.5)
    assert late == "the final file takes 62.5% of the dense latency (batch 1, 1 thread, cpu), 50.0% was asked for."


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_whole_run_lands_on_a_latency(tmp_path, monkeypatch, capsys, cuts):
    """The clock is exchanged for one that knows MACs, so that the outcome can be told exactly."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)

    def kept(clock, model):
        clock._export(model, "candidate")
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
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.3", "--metric",
         "latency", "--dry-run", *QUICK]
    )  # fmt: skip
    assert "of the MACs removed:" in capsys.readouterr().out
