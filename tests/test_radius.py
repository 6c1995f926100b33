"""Radii that cannot be meant are refused at every door: recipes, flags, sweeps and Python."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import robust_prune as rp
from robust_prune import radius
from robust_prune.errors import UsageError
from robust_prune.recipe_reader import load, make_section, with_threat_of


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.3", 0.3), (0.5, 0.5), ("1e-2", 0.01)]
)
def test_fractions_are_read_as_papers_write_them(text: object, value: float) -> None:
    assert radius.number(text) == value


@pytest.mark.parametrize("text", ["8/0", "8/256/2", "eight", "", "/", "8/"])
def test_what_is_no_number_is_refused_in_one_line(text: object) -> None:
    with pytest.raises(UsageError, match=r"^threat\.epsilon must be a number or a fraction such as 8/255, got"):
        load(None, {"threat.epsilon": text})
    with pytest.raises(UsageError, match=r"^evaluation\.sweep\.1 must be a number or a fraction"):
        load(None, {"evaluation.sweep": ["2/255", text]})


def test_a_truth_value_is_no_radius() -> None:
    with pytest.raises(UsageError, match=r"^threat\.epsilon must be a number, got true"):
        load(None, {"threat.epsilon": True})


def test_a_huge_exponent_is_read_at_once() -> None:
    with pytest.raises(UsageError, match=r"threat\.epsilon: input should be a finite number"):
        load(None, {"threat.epsilon": "1e99999999"})


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(8, "Did you mean 8/255?"), (4.0, "Did you mean 4/255?"), (1.5, "Did you mean 1.5/255?"), (300, "Try 8/255.")],
)
def test_an_linf_radius_above_one_is_refused_with_what_was_probably_meant(epsilon: float, words: str) -> None:
    wanted = f"must be at most 1 for linf, since pixels lie in [0, 1], got {epsilon:g}. {words}"
    assert radius.refusal("linf", epsilon).startswith(wanted)
    with pytest.raises(UsageError) as raised:
        load(None, {"threat.norm": "linf", "threat.epsilon": epsilon})
    assert f"threat.epsilon {wanted}" in str(raised.value)
    with pytest.raises(UsageError) as raised:
        with_threat_of(load(None, {"threat.epsilon": epsilon}), None)
    assert f"threat.epsilon {wanted}" in str(raised.value)
    with pytest.raises(UsageError) as raised:
        rp.ThreatModel("linf", epsilon)
    assert wanted in str(raised.value)


def test_one_is_the_largest_linf_radius_and_l2_has_another_scale() -> None:
    assert rp.ThreatModel("linf", 1).epsilon == 1.0
    assert load(None, {"threat.norm": "linf", "threat.epsilon": 1}).threat.epsilon == 1
    assert load(None, {"threat.norm": "l2", "threat.epsilon": 3, "evaluation.sweep": [5]}).evaluation.sweep == (5.0,)
    known = rp.ThreatModel("l2", 0.5)
    assert with_threat_of(load(None, {"threat.epsilon": 3}), known).threat_model == rp.ThreatModel("l2", 3)


@pytest.mark.parametrize("known", [None, rp.ThreatModel("linf", 0.1)])
def test_a_sweep_is_held_against_the_norm_of_the_threat(known: rp.ThreatModel | None) -> None:
    with pytest.raises(UsageError, match=r"^evaluation\.sweep must be at most 1 .* got 2\. Did you mean 2/255\?"):
        with_threat_of(load(None, {"evaluation.sweep": [0.1, 2, 4]}), known)
    swept = load(None, {"evaluation.sweep": [0.1, 2, 4]})
    assert with_threat_of(swept, rp.ThreatModel("l2", 0.5)).evaluation.sweep == (0.1, 2, 4)


def test_a_radius_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nthreat:\n  norm: linf\n  epsilon: 8\n")
    with pytest.raises(UsageError, match=r"Did you mean 8/255\?.*mine\.yaml:4\)"):
        load(str(path))
    path.write_text("threat: {norm: linf}\nevaluation:\n  sweep: [0.1, 4]\n")
    with pytest.raises(UsageError, match=r"Did you mean 4/255\?.*mine\.yaml:3\)"):
        load(str(path))


def test_an_l2_radius_beyond_every_image_is_refused() -> None:
    recipe = load(None, {"threat.norm": "l2", "threat.epsilon": 128})
    with pytest.raises(UsageError, match=r"at most 55\.43 for l2, .* 3x32x32 image, got 128\. Did you mean 128/255\?"):
        with_threat_of(recipe, None, (3, 32, 32))
    assert with_threat_of(recipe, None, (3, 224, 224)).threat.epsilon == 128


def test_l2_asks_for_its_own_radius(tmp_path: Path) -> None:
    wanted = r"norm l2 needs a radius of its own, got none\..*0\.5"
    path = tmp_path / "linf.yaml"
    path.write_text("threat: {norm: linf, epsilon: 8/255}\n")
    for recipe in (load(None, {"threat.norm": "l2"}), load(str(path), {"threat.norm": "l2"})):
        for known in (None, rp.ThreatModel("linf", 8 / 255)):
            with pytest.raises(UsageError, match=wanted):
                with_threat_of(recipe, known)
        assert with_threat_of(recipe, rp.ThreatModel("l2", 0.25)).threat.epsilon == 0.25
    path.write_text("threat: {norm: l2}\n")
    with pytest.raises(UsageError, match=wanted):
        with_threat_of(load(str(path)), None)
    with pytest.raises(UsageError, match=wanted):
        rp.ThreatModel("l2")
    assert rp.ThreatModel() == rp.ThreatModel("linf") == rp.ThreatModel("linf", 8 / 255)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_what_is_no_radius_is_refused_in_python(bad: float) -> None:
    for norm in ("linf", "l2"):
        with pytest.raises(UsageError, match="epsilon must be a finite number >= 0"):
            rp.ThreatModel(norm, bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^threat\.epsilon: input should be"):
        load(None, {"threat.epsilon": bad})


@pytest.mark.parametrize("bad", ["8/255", True, [0.1]])
def test_a_threat_model_wants_a_number(bad: object) -> None:
    with pytest.raises(UsageError, match="epsilon must be a number such as 8 / 255, got"):
        rp.ThreatModel("linf", bad)  # type: ignore[arg-type]


def test_a_section_from_python_is_refused_in_the_same_words() -> None:
    from robust_prune.recipe import ThreatSection

    with pytest.raises(UsageError, match=r"^threat\.epsilon must be at most 1 .*Did you mean 8/255\?"):
        make_section(ThreatSection, norm="linf", epsilon=8)
