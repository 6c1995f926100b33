"""Recipes: fractions, overrides, refusals with file and line, and every shipped recipe."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from robust_prune.cli import app
from robust_prune.errors import UsageError
from robust_prune.recipe import EvaluationSection, FinetuneSettings, Recipe
from robust_prune.recipe_reader import find, load, make_section, shipped


def _write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_epsilon_may_be_a_fraction(tmp_path):
    assert load(_write(tmp_path, "threat: {epsilon: 4/255}")).threat.epsilon == pytest.approx(4 / 255)


def test_flags_override_the_file_and_none_does_not(tmp_path):
    source = _write(tmp_path, "pruning: {ratio: 0.3, round_to: 4}\nseed: 7")
    recipe = load(source, {"pruning.ratio": "0.6", "seed": None})
    assert (recipe.pruning.ratio, recipe.pruning.round_to, recipe.seed) == (0.6, 4, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pruning:\n  ratio: 0.5\n  roun_to: 4\n",
            r"unknown recipe key pruning\.roun_to\. Did you mean round_to\? \(.*mine\.yaml:3\)",
        ),
        ("seed: 0\npruning:\n  ratio: 1.5\n", r"ratio must be in \(0, 1\), got 1\.5\. Try 0\.5\. \(.*mine\.yaml:3\)"),
        (
            "finetune: {loss: magic}\n",
            r"finetune\.loss must be one of .*trades.*file\.py:function, got 'magic' \(.*mine\.yaml:1\)",
        ),
        ("finetune: {epochs: many}\n", r"finetune\.epochs: .*got 'many'"),
        ("- a\n- b\n", r"must hold a mapping"),
        ("a: [1\n", r"is not valid YAML"),
        ("zebra: 1\n", r"unknown recipe key zebra\. Known: seed,"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load(_write(tmp_path, text))


def test_a_bad_flag_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(UsageError) as error:
        load(_write(tmp_path, "pruning: {ratio: 0.5}"), {"pruning.ratio": "1.5"})
    assert str(error.value) == "ratio must be in (0, 1), got 1.5. Try 0.5."


def test_an_unknown_recipe_name_is_answered_with_a_near_one():
    with pytest.raises(UsageError, match="Did you mean demo"):
        find("dem0")


def test_resolved_recipes_round_trip(tmp_path):
    recipe = load(None, {"pruning.ratio": 0.25, "threat.epsilon": "8/255"})
    assert load(_write(tmp_path, recipe.to_yaml())) == recipe


def test_a_recipe_that_changes_one_setting_of_fine_tuning_keeps_its_other_defaults(tmp_path):
    changed = load(_write(tmp_path, "finetune: {epochs: 9}"))
    assert changed.finetune == Recipe().finetune.model_copy(update={"epochs": 9})
    assert changed.finetune.crop_padding == 0 and changed.training.crop_padding == 4


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid_and_headed_by_its_command(name):
    path = shipped()[name]
    assert isinstance(load(name), Recipe)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("robust-prune" in line for line in head)
    assert any(re.search(r"hardware|time", line, re.IGNORECASE) for line in head)


def test_every_recipe_value_is_documented():
    for section in Recipe.model_fields.values():
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description, name


def test_infinite_times_are_refused() -> None:
    with pytest.raises(UsageError, match=r"baseline\.minutes: .*finite number"):
        load(None, {"baseline.minutes": float("inf")})


def test_a_value_below_what_is_no_section_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot set pruning\.ratio: pruning is not a section of the recipe"):
        load(_write(tmp_path, "pruning: 3"), {"pruning.ratio": 0.5})


def test_a_bad_part_of_a_flag_is_not_blamed_on_the_file(tmp_path):
    source = _write(tmp_path, "bench: {batches: [1]}")
    with pytest.raises(UsageError) as error:
        load(source, {"bench.batches": [1, 0]})
    assert str(error.value) == "bench.batches.1: input should be greater than or equal to 1, got 0"
    with pytest.raises(UsageError, match=r"bench\.seconds: .*got 0 \(.*mine\.yaml:1\)"):
        load(_write(tmp_path, "bench: {seconds: 0}"), {"bench.batches": [1]})


def test_sections_from_python_are_refused_in_the_same_words():
    with pytest.raises(UsageError, match=r"^evaluation\.steps: input should be greater than or equal to 1, got 0$"):
        make_section(EvaluationSection, steps=0)
    with pytest.raises(UsageError, match=r"^unknown recipe key finetune\.epoch\. Did you mean epochs\?$"):
        make_section(FinetuneSettings, epoch=3)
    assert make_section(EvaluationSection, steps=3) == EvaluationSection(steps=3)


def test_keys_by_their_former_names_are_taken_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text("pruning: {of: params, compensation: none}\n")
    found = load(str(tmp_path / "old.yaml"), {"pruning.compensation_images": 64})
    assert (found.pruning.metric, found.pruning.repair, found.pruning.repair_images) == ("params", "none", 64)
    said = " ".join(capsys.readouterr().out.split())
    assert "Note: the recipe key pruning.of is called pruning.metric now." in said and said.count("Note:") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pruning: {ratio: 0.5, ratio: 0.9}\n", "line 1 begins a mapping that has the key 'ratio' twice"),
        ("seed: 0\nevaluation:\n  images: true\n", r"evaluation\.images must be a number, got true.*mine\.yaml:3"),
        ("training: {lr: false}\n", "training.lr must be a number, got false"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{arch: cifar/wideresnet_1000006_10}", "with more than 20,000 parameters"),
        ("{arch: cifar/resnet20_x9000}", "needs .* GB for its weights and their training"),
        ("{arch: timm/resnet18, kwargs: {layers: [100000, 1, 1, 1]}}", "with more than 20,000 parameters"),
        (
            "{arch: timm/resnet18, kwargs: {checkpoint_path: x.pth}}",
            "checkpoint_path would let timm/resnet18",
        ),
    ],
)
def test_a_recipe_of_one_line_asks_for_no_more_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"model: {model}\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=words):
        app(["train", "--recipe", "r.yaml", "--data", "sample", "--out", "run"], exit_on_error=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000 and not Path("run").exists()
