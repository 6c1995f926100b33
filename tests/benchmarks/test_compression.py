"""The headline benchmark: one small base through all arms, and the arithmetic of its tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.places import BENCHMARKS

import robust_prune as rp
from robust_prune.models.registry import build

sys.path.insert(0, str(BENCHMARKS))

import compression
import compression_table


def bits(right: np.ndarray) -> str:
    return np.packbits(right.astype(bool)).tobytes().hex()


def row(arm: str, seed: int, robust: np.ndarray, **more: Any) -> dict[str, Any]:
    attacked = {"images": len(robust), "clean": bits(np.ones(len(robust))), "robust": bits(robust)}
    return {
        "seed": seed, "ratio": 0.75, "minutes": 2.0, "arm": arm, "macs": 4e7, "params": 3e5, "cut_seconds": 60.0,
        "train_seconds": 120.0, "pgd": attacked, "aa_fast": attacked, "flags": [],
        "environment": {"cpu": "a processor", "commit": "0123456789"}, **more,
    }  # fmt: skip


def base(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows, "analysis_seconds": {str(seed): {"mrs": 240.0, "cuts": 720.0} for seed in range(3)}}


def test_the_mean_over_networks_weighs_each_alike_and_pairs_by_seed_and_image() -> None:
    generator = np.random.default_rng(0)
    mrs = [generator.random(1000) < 0.4 for _ in range(3)]
    worse = [right & (np.arange(1000) % 10 > 0) for right in mrs]  # about 4 points less
    one = base([row("mrs", s, r) for s, r in enumerate(mrs)] + [row("uniform", s, r) for s, r in enumerate(worse)])
    other = base([row("mrs", 0, mrs[0]), row("uniform", 0, mrs[0])])  # one seed, no difference
    text = compression_table.tables({"one": one, "other": other})
    joint = next(line for line in text.splitlines() if line.startswith("| uniform |"))
    value = -100 * np.mean([(m & ~w).mean() for m, w in zip(mrs, worse, strict=True)]) / 2
    assert joint.startswith(f"| uniform | {value:+.1f} [") and joint.endswith("], 2 |")
    assert "| mrs | 2 | 7.0 | 3 | 40.0 M | 300 k | – | – | – | 100.0 [100.0, 100.0] |" in text


def test_minutes_in_all_count_the_real_cuts_and_nothing_but_training_from_scratch() -> None:
    right = np.ones(100)
    text = compression_table.tables({"one": base([row(arm, 0, right) for arm in ("mrs", "cuts", "from scratch")])})
    found = {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in text.splitlines() if " | 40.0 M | " in line}
    assert found == {"mrs": "7.0", "cuts": "15.0", "from scratch": "2.0"}


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
    arms = ["--arms", "mrs", "cuts", uniform, compression.SCRATCH]
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
