"""The documentation: its examples run, its pages are listed, and what it says of recipes is what recipes take."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.table import Table

import robust_prune as rp
from robust_prune import cli, recipe_docs
from robust_prune.catalogue import ALLOCATIONS, CRITERIA, LOSSES, TIERS
from robust_prune.recipe import Recipe
from robust_prune.recipe_reader import load
from robust_prune.shown import as_html

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXTENDING = (DOCS / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", EXTENDING, re.DOTALL))
VALUES = {
    f"{section}.{key}" if isinstance(value, dict) else section: default
    for section, value in Recipe().model_dump(mode="json").items()
    for key, default in (value.items() if isinstance(value, dict) else [("", value)])
}
"""Every key of a recipe with its default."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files of the page on extending."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_mapped_images(folder: Path) -> None:
    """Three classes told apart by the brightest colour channel."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("validation", 30), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 60
        np.save(folder / f"{part}_images.npy", images)
        np.save(folder / f"{part}_labels.npy", labels)


def test_every_python_example_is_marked_and_so_tested():
    assert EXTENDING.count("```python") == sum(name.endswith(".py") for name in EXAMPLES)


def test_the_examples_of_extensions_work_together(here):
    torch.manual_seed(0)
    write_mapped_images(here)
    data = runpy.run_path("my_data.py")["open_mapped"](here, ("red", "green", "blue"))
    model = runpy.run_path("my_model.py")["make_model"](3)

    analysis = rp.analyse(
        model, data, sensitivity__images=16, sensitivity__steps=1, pruning__criterion="my_criterion.py:l1"
    )
    written = model.deep.weight.detach().double().abs().sum((1, 2, 3))
    deep = next(group.name for group in analysis.search.groups if group.name.endswith("deep"))
    torch.testing.assert_close(analysis.scores[deep], written / written.mean())

    plan = rp.plan(analysis, ratio=0.5, allocation="my_allocation.py:square_root", round_to=1)
    assert plan.allocation == "my_allocation.py:square_root" and abs(plan.macs_after / plan.macs_before - 0.5) < 0.02
    small = rp.prune(model, plan, data, pruning__repair_images=16)
    assert small.module.backbone.width == plan.groups[0].keep < model.width == 32

    tuned = rp.finetune(
        small, data, epochs=1, batch_size=32, loss="my_loss.py:paired", distillation=0.5, teacher=model,
        validation_images=20, validation_steps=1,
    )  # fmt: skip
    assert len(tuned.history) == 1 and np.isfinite(tuned.history[0].train_loss)
    card = rp.evaluate(small, data, 4 / 255, tier="my_tier.py:untargeted", images=10, steps=2)
    assert card.tier == "my_tier.py:untargeted" and card.breakdown.keys() == {"pgd", "apgd-ce", "square"}


def test_the_example_that_lists_groups_prints_them(here, capsys):
    runpy.run_path("groups.py")
    listed = "stem: 32 channels, written by stem gate\ndeep: 48 channels, written by deep\n"
    assert capsys.readouterr().out == listed


def test_the_groups_of_entry_points_are_those_of_the_catalogues():
    points = tomllib.loads(EXAMPLES["pyproject.toml"])["project"]["entry-points"]
    assert list(points) == [f"robust_prune.{c.folder}" for c in (CRITERIA, ALLOCATIONS, LOSSES, TIERS)]
    files = "".join(EXAMPLES.values())
    assert all(f"def {value.partition(':')[2]}(" in files for group in points.values() for value in group.values())


def test_the_named_functions_files_and_tests_exist():
    for catalogue in (CRITERIA, ALLOCATIONS, LOSSES, TIERS):
        folder = f"robust_prune/{catalogue.folder.replace('.', '/')}"
        assert f"| {catalogue.kind} | `{folder}/NAME.py` | `{catalogue.function}(" in EXTENDING
    for path in re.findall(r"`((?:robust_prune|tests|benchmarks)/[\w/]+(?:\.py|/))`", EXTENDING):
        assert path.endswith("NAME.py") or (ROOT / path).exists(), path
    contracts = re.findall(r"The contract tests? (?:is|are) (.*?) in\s`(tests/[\w/]+\.py)`", EXTENDING, re.DOTALL)
    assert len(contracts) == 4
    for names, file in contracts:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"def {name}(" in text for name in re.findall(r"`(\w+)`", names)), names
    rules = {
        "repairs": ("repairs",), "cutting": ("_BY_TYPE", "_others"), "graph": ("_slice",),
        "attention": ("_classify", "alternatives"),
    }  # fmt: skip
    for file, named in rules.items():
        text = (ROOT / "robust_prune" / "structure" / f"{file}.py").read_text(encoding="utf-8")
        assert all(re.search(rf"^\s*(def )?{name}\b", text, re.MULTILINE) for name in named), file


PAGES = sorted(path.stem for path in DOCS.glob("*") if path.suffix in (".md", ".rst"))


def test_every_page_is_in_a_table_of_contents():
    trees = re.findall(r":::\{toctree\}\n(.*?):::", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(["index", *listed]) == PAGES


def test_the_configuration_names_every_key_with_its_default():
    text = recipe_docs.to_markdown(recipe_docs.describe())
    stated = dict(re.findall(r"```\{confval\} (\S+)\n.*?\*Default:\* `(.*?)`\.\n```", text, re.DOTALL))
    assert stated.keys() == VALUES.keys()
    for key, default in stated.items():
        assert (default == "null") == (VALUES[key] is None), key
        assert load(None, {key: yaml.safe_load(default)}) == Recipe(), key


def test_the_recipe_of_the_configuration_page_is_valid():
    text = re.search(r"```yaml\n(.*?)```", (DOCS / "configuration.md").read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    assert Recipe.model_validate(yaml.safe_load(text[1])).finetune.loss == "trades"


def test_types_and_limits_are_in_words():
    kinds = {key.name: key.kind for section in recipe_docs.describe() for key in section.keys}
    assert kinds["pruning.ratio"] == "number, above 0 and below 1"
    assert kinds["pruning.cuts"] == "whole number, at least 1 and at most 100"
    assert kinds["finetune.lr"] == "number, above 0, or null"
    assert kinds["finetune.flip"] == "true or false"
    assert kinds["bench.batches"] == "list of whole numbers, each at least 1, not empty"
    assert kinds["bench.kinds"] == "list of choices, not empty"
    assert kinds["evaluation.sweep"] == "list of numbers, each at least 0"
    assert kinds["pruning.criterion"] == "name, or file.py:function"


def explained(capsys, *arguments: str) -> str:
    cli.main(["recipes", "explain", *arguments])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_a_key_is_explained(capsys):
    assert explained(capsys, "finetune.lr") == (
        "finetune.lr Peak learning rate (SGD with Nesterov momentum). By default 0.1; in a run of fewer than 600 steps "
        "0.1 times sqrt(steps / 600). type number, above 0, or null default null"
    )
    criterion = explained(capsys, "pruning.criterion")
    assert all(f"{name} {help}" in criterion for name, help in CRITERIA.choices.items())
    assert "file.py:function" in criterion and "default adversarial_taylor" in criterion
    assert "choices auto, on, off" in explained(capsys, "training.compile")


def test_sections_and_all_keys_are_explained(capsys):
    section = explained(capsys, "evaluation")
    assert section.startswith("evaluation Measurement of robust accuracy.") and "restarts 2 Number of random" in section
    everything = explained(capsys)
    assert all(key.rpartition(".")[2] in everything for key in VALUES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("finetune.lrr", "Did you mean finetune.lr?"),
        ("lr", "Did you mean training.lr or finetune.lr?"),
        ("pruning.loss", "Did you mean training.loss or finetune.loss?"),
        ("prunin", "Did you mean pruning?"),
        ("zebra", "`robust-prune recipes explain` lists all keys."),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(capsys, name, hint):
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipes", "explain", name])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: unknown recipe key {name!r}. {hint}\n"


def test_explaining_a_recipe_needs_no_torch():
    code = "import sys, robust_prune.recipe_docs as d; d.describe(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_table_is_shown_once_in_a_notebook(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("shown beside the HTML that is returned"))
    assert as_html(Table("heading")).startswith("<pre")


def test_the_notebook_is_python_on_the_embedded_sample():
    text = (DOCS / "notebook.md").read_text(encoding="utf-8")
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, re.DOTALL)
    code = "\n".join(cells)
    compile(code, "notebook.md", "exec")
    used = set(re.findall(r"\brp\.(\w+)", code))
    steps = {"load", "load_data", "analyse", "plan", "prune", "finetune", "evaluate", "export", "benchmark", "save"}
    assert steps <= used <= set(rp.__all__) and 'rp.load_data("sample")' in code
