"""The embedded sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders.data_files import as_rows, everything
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_prune.data import sample
from robust_prune.data.class_names import BY_DATA
from robust_prune.data.sources import load_data
from robust_prune.errors import EnvironmentProblem


def test_the_embedded_sample() -> None:
    bundle = load_data("sample")
    assert (
        bundle.sample
        and "indicative" in bundle.cautions[0]
        and len(bundle.cautions) == 1
        and bundle.class_names == BY_DATA["cifar10"]
    )
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (1800, 200, 500)
    for images, per_class in ((bundle.train, 180), (bundle.validation, 20), (bundle.test, 50)):
        assert everything(images)[1].bincount().tolist() == [per_class] * 10
    parts = [as_rows(part) for part in (bundle.train, bundle.validation, bundle.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 2500
    mean = everything(bundle.train)[0].float().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx(bundle.mean, abs=0.02)


def test_sample_positions_are_distinct_and_inside_the_official_splits() -> None:
    stored = sample.read_arrays()
    for part, total in (("train", 50_000), ("test", 10_000)):
        index = stored[f"index_{part}"]
        assert len(index) == len(np.unique(index)) == len(stored[f"x_{part}"])
        assert index.min() >= 0 and index.max() < total


@pytest.mark.slow
def test_sample_equals_the_official_images() -> None:
    path = Path.home() / ".cache" / "robust-prune-data" / "cifar10.npz"
    if not path.is_file():
        pytest.skip("needs the whole of CIFAR-10 as .npz")
    stored, whole = sample.read_arrays(), np.load(path)
    for part in ("train", "test"):
        index = stored[f"index_{part}"]
        assert np.array_equal(whole[f"x_{part}"][index], stored[f"x_{part}"])
        assert np.array_equal(whole[f"y_{part}"][index], stored[f"y_{part}"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), side=st.integers(1, 6), high=st.sampled_from([2, 16, 256]))
def test_the_samples_coding_is_lossless(seed: int, count: int, side: int, high: int) -> None:
    rng = np.random.default_rng(seed)
    images = (rng.integers(0, high, (count, side, side, 3)) * (255 // (high - 1))).astype(np.uint8)
    assert np.array_equal(sample.decode(sample.encode(images), count, side), images)


def test_a_damaged_sample_is_an_environment_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "sample").mkdir(parents=True)
    monkeypatch.setattr(sample.resources, "files", lambda _: tmp_path)
    with pytest.raises(EnvironmentProblem, match="Reinstall"):
        load_data("sample")
    (tmp_path / "data" / "sample" / sample.FILE).write_bytes(b"torn")
    with pytest.raises(EnvironmentProblem, match="Reinstall"):
        load_data("sample")
