"""Sizes and latencies that stand for a ratio."""

from __future__ import annotations

import pytest

import robust_prune as rp
from robust_prune.bench import candidates
from robust_prune.bench.candidates import DenseLatency
from robust_prune.budget.counting import count_macs, count_params
from robust_prune.commands.targets import Target, target_of, with_target
from robust_prune.errors import UsageError
from robust_prune.recipe import Recipe
from robust_prune.runs.cache import Cache


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (("50M", None, None), Target("macs", 50e6)), (("1.2 G", None, None), Target("macs", 1.2e9)),
        ((None, "300k", None), Target("params", 3e5)), ((None, "12345", None), Target("params", 12345)),
        ((None, None, "5ms"), Target("latency", 5)), ((None, None, "250us"), Target("latency", 0.25)),
        ((None, None, "0.5 s"), Target("latency", 500)), ((None, None, "5"), Target("latency", 5)),
        ((None, None, None), None),
    ],
)  # fmt: skip
def test_numbers_have_units(texts: tuple[str | None, ...], wanted: Target | None) -> None:
    assert target_of(*texts) == wanted


@pytest.mark.parametrize("text", ["", "few", "-5M", "0", "5X", "nan", "inf", "1e99", "5ms"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--target-macs must be a positive number such as 50M"):
        target_of(text, None, None)


def test_a_target_is_the_ratio_that_leaves_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = rp.load("demo"), rp.load_data("sample")
    macs, params = count_macs(model.module, model.spec.blank_image()), count_params(model.module)
    asked = []
    monkeypatch.setattr(candidates, "median_alone", lambda *_: asked.append(1) or DenseLatency(10.0))

    def found(target: Target) -> tuple[str, float]:
        section = with_target(Recipe(), target, model, data, Cache(tmp_path)).pruning
        return section.metric, section.ratio

    assert found(Target("macs", macs / 4)) == ("macs", 0.75)
    assert found(Target("params", params / 2)) == ("params", 0.5)
    assert found(Target("latency", 4)) == ("latency", 0.6) == found(Target("latency", 4)) and len(asked) == 1
    for target, words in (
        (Target("macs", macs), "--target-macs 162,366,720: the dense model has 162,366,720 MACs. Ask for fewer."),
        (Target("latency", 12), "--target-latency 12: the dense model has 10 ms. Ask for fewer."),
    ):
        with pytest.raises(UsageError) as error:
            found(target)
        assert str(error.value) == words
