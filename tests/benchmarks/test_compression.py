"""The headline benchmark: one small base through all arms, and the arithmetic of its tables."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.places import BENCHMARKS

import robust_prune as rp
from robust_prune.models.registry import build
from robust_prune.recipe_reader import load

sys.path.insert(0, str(BENCHMARKS))

import compression
import compression_plot
import compression_table


def bits(right: np.ndarray) -> str:
    return np.packbits(right.astype(bool)).tobytes().hex()


def row(arm: str, seed: int, robust: np.ndarray, **more: Any) -> dict[str, Any]:
    attacked = {"images": len(robust), "clean": bits(np.ones(len(robust))), "robust": bits(robust)}
    return {
        "seed": seed, "ratio": 0.75, "minutes": 2.0, "arm": arm, "macs": 4e7, "params": 3e5, "macs_kept": 0.25,
        "round_to": 8, "rolled_back": [], "analysis_seconds": 240.0, "cut_seconds": 60.0,
        "train_seconds": 120.0, "pgd": attacked, "aa_fast": attacked, "flags": [],
        "environment": {"cpu": "a processor", "commit": "0123456789"}, **more,
    }  # fmt: skip


def base(rows: list[dict[str, Any]], data: str = "cifar10") -> dict[str, Any]:
    return {"rows": rows, "settings": {"data": data}}


def test_the_mean_over_networks_weighs_each_alike_and_pairs_by_seed_and_image() -> None:
    generator = np.random.default_rng(0)
    mrs = [generator.random(1000) < 0.4 for _ in range(3)]
    worse = [right & (np.arange(1000) % 10 > 0) for right in mrs]  # about 4 points less
    one = base([row("mrs", s, r) for s, r in enumerate(mrs)] + [row("uniform", s, r) for s, r in enumerate(worse)])
    other = base([row("mrs", 0, mrs[0]), row("uniform", 0, mrs[0])])  # one seed, no difference
    text = compression_table.tables({"one": one, "other": other})
    joint = next(line for line in text.splitlines() if line.startswith("| uniform |"))
    value = -100 * np.mean([(m & ~w).mean() for m, w in zip(mrs, worse, strict=True)]) / 2
    assert joint.startswith(f"| uniform | {value:+.1f} [") and joint.endswith("], 2, 4 |")
    assert "| mrs | 2 | 7.0 | 3 | 40.0 M (8) | 300 k | – | – | – | 100.0 [100.0, 100.0] |" in text


def test_minutes_in_all_count_the_real_cuts_and_nothing_but_training_from_scratch() -> None:
    right = np.ones(100)
    arms = [row(arm, 0, right) for arm in ("mrs", "cuts", "from scratch")]
    arms[1]["analysis_seconds"] = 720.0
    text = compression_table.tables({"one": base(arms)})
    found = {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in text.splitlines() if " | 40.0 M (8) | " in line}
    assert found == {"mrs": "7.0", "cuts": "15.0", "from scratch": "2.0"}


def test_what_differs_from_the_protocol_is_marked() -> None:
    rows = [row("mrs", 0, np.ones(100)), row("cuts", 0, np.ones(100), macs_kept=0.26, rolled_back=[{"name": "a"}])]
    text = compression_table.tables({"one": base(rows)})
    assert "| mrs | 2 | 7.0 | 1 | 40.0 M (8) |" in text and "| cuts | 2 | 7.0 | 1 | 40.0 M (8)* |" in text
    assert "Groups that failed their proof stayed whole: cuts, seed 0." in text


def test_images_of_one_data_set_are_drawn_once_for_all_its_networks() -> None:
    right = 100.0 * (np.random.default_rng(0).random((1, 1000)) < 0.1)

    def width(names: tuple[str, str]) -> float:
        low, high = compression_table.mean_text([(name, right) for name in names]).split("[")[1].rstrip("]").split(", ")
        return float(high) - float(low)

    assert width(("a", "a")) > 1.25 * width(("a", "b")), "the same images twice say no more than once"


def test_latencies_are_those_of_one_thread() -> None:
    made = {"label": "mrs", "batch": 1, "p50_low": 0.9, "p50_high": 1.1}
    times = [{**made, "kind": "host", "p50_ms": 1.0}, {**made, "kind": "defaults", "p50_ms": 7.0}]
    stored = base([row("mrs", 0, np.ones(100))]) | {"latency": {"0.75": {"rows": times}}}
    assert "| 1 [0.9, 1.1] | – | – |" in compression_table.tables({"one": stored})


def test_the_plot_has_a_point_for_each_timed_cell_and_from_scratch_shares_the_uniform_network() -> None:
    arms = ["mrs", "uniform, adversarial Taylor", compression.SCRATCH]
    made = {"batch": 1, "kind": "host", "p50_low": 0.9, "p50_high": 1.1}
    times = [{**made, "label": "dense", "p50_ms": 2.0}, *({**made, "label": a, "p50_ms": 1.0} for a in arms[:2])]
    rows = [row(arm, 0, np.arange(100) < 40, minutes=m) for arm in arms for m in (2.0, 10.0)]
    stored = base([*rows, row("mrs", 0, np.ones(100), ratio=0.9)]) | {"latency": {"0.75": {"rows": times}}}
    drawn = ElementTree.fromstring(compression_plot.plot({"one & only": stored}))
    tips = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert tips == [f"{a}, 75 % of the MACs removed, {m} min: 1 ms, 40.0 %" for a in arms for m in (2, 10)]
    assert compression_plot.plot({"untimed": base(rows)}) == ""


def test_all_bases_have_a_recipe_and_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    for source in compression.BASES.values():
        load(source.recipe)
    stored = {"rows": [], "settings": {"model": "a", "data": "cifar10"}}
    compression.check(stored, {"model": "a", "data": "cifar10"}, tmp_path)
    with pytest.raises(SystemExit, match=r"rows of other settings \(model\)"):
        compression.check(stored, {"model": "b", "data": "cifar10"}, tmp_path)


@pytest.mark.slow
def test_a_base_goes_through_all_arms_and_what_is_stored_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, demo = tmp_path / "base.safetensors", rp.load("demo")
    spec = replace(demo.spec, arch="cifar/resnet20")
    rp.save(replace(demo, spec=spec, module=build(spec, pretrained=False).eval()), file)
    monkeypatch.setattr(compression, "BASES", {"tiny": compression.Source("smoke", str(file))})
    monkeypatch.setattr(compression, "SEEDS", {0.5: (0,)})
    monkeypatch.setattr(compression, "IMAGES", 64)
    monkeypatch.setattr(compression, "JUDGED", 16)
    uniform = "uniform, adversarial Taylor"
    arms = ["--arms", "mrs", "cuts, branches", uniform, compression.SCRATCH]
    arguments = ["tiny", "--minutes", "0.02", "--ratios", "0.5", "--out", str(tmp_path / "rows")]
    compression.main(["rows", *arguments, *arms])
    stored = json.loads((tmp_path / "rows" / "tiny.json").read_text("utf-8"))
    assert [row["arm"] for row in stored["rows"]] == arms[1:]
    assert all(abs(row["macs_kept"] / 0.5 - 1) < 0.005 for row in stored["rows"])
    by_key = {compression.key(row): row for row in stored["rows"]}
    scratch, cut = (by_key[0, 0.5, 0.02, arm] for arm in (compression.SCRATCH, uniform))
    assert scratch["widths"] == cut["widths"] and scratch["images"] > 3 * cut["images"]
    compression.main(["latency", *arguments])
    text = (tmp_path / "rows.md").read_text("utf-8")
    assert text.count("–") == 0 and str(tmp_path) not in text + (tmp_path / "rows" / "tiny.json").read_text("utf-8")
    capsys.readouterr()
    compression.main(["rows", *arguments, *arms])
    assert "seed 0" not in capsys.readouterr().out
