"""README and docs: their commands exist, their links lead somewhere, and their figures are the committed ones."""

from __future__ import annotations

import re
import shlex

import pytest
from builders.places import ROOT

from robust_prune import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])
REPOSITORY = r"https://(?:github\.com/robust-prune/robust-prune/blob|raw\.githubusercontent\.com/robust-prune/robust-prune)/main/"
BLOCKS = re.findall(r"```bash\n(.*?)```", EVERYTHING, re.DOTALL)
LINES = [line.removeprefix(".venv/bin/") for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [
    line.replace("-m robust_prune ", "robust-prune ")[line.find("-m robust_prune ") if launched else 0 :]
    for line in LINES
    if (launched := line.startswith(("torchrun ", "accelerate "))) or line.startswith("robust-prune ")
]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_is_understood(command):
    tokens = shlex.split(command)[1:]
    _, bound, _ = cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert bound is not None


def test_there_are_commands_for_every_verb():
    assert {command.split()[1] for command in COMMANDS} >= {
        "compress", "train", "sensitivity", "evaluate", "export", "bench", "report", "doctor", "recipes",
    }  # fmt: skip


def test_the_setup_commands_are_the_ones_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    marks = re.findall(r"<!-- ci:(\w+) -->\n```bash", README)
    assert marks == ["demo", "tests", "development", "docs"]
    assert f"for name in {' '.join(marks)}; do" in script


def test_the_tables_are_the_committed_ones():
    results = ROOT / "benchmarks" / "results"
    named = re.findall(r"<!-- from (\S+) -->\n\n?((?:\|.*\n)+)", EVERYTHING)
    assert len(named) >= 3, "the README and the docs quote too few tables"
    for file, table in named:
        committed = (results / file).read_text(encoding="utf-8").splitlines()
        for line in table.splitlines():
            assert line in committed, f"{file} has no line {line}"


def prose_of(page: str) -> list[str]:
    """Return the paragraphs without code, tables, links and the conditions that a table's command printed."""
    without = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.DOTALL)
    without = re.sub(r"\]\([^)]*\)|arXiv [0-9.]+|Python 3\.[0-9]+|Linf [0-9/]+|Apache-2.0", "", without)
    return [part for part in without.split("\n\n") if not part.startswith(("|", "    "))]


def test_every_figure_of_the_readme_is_in_the_results_that_it_names():
    results = ROOT / "benchmarks" / "results"
    quoted = 0
    for part in prose_of(README):
        figures = re.findall(r"\d+\.\d+(?: \[[0-9., +-]+\])?", part.replace("\n", " "))
        if not figures:
            continue
        source = re.search(r"<!-- figures from (.+) -->", part)
        assert source is not None, f"no results are named for {figures}"
        text = "".join((results / name).read_text(encoding="utf-8") for name in source[1].split())
        for figure in figures:
            quoted += 1
            assert figure in text, f"{source[1]} has no {figure}"
            assert "[" in figure or f"{figure} [" not in text, f"{figure} stands without its interval"
        assert "robust" not in part or re.search(r"PGD-\d+|aa-fast|AutoAttack", part), "which attack?"
    assert quoted >= 2


def test_as_many_architectures_as_the_readme_says_went_through():
    rows = (ROOT / "benchmarks" / "results" / "zoo.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row in rows if row.count("|") == 8][2:]
    through = sum("| yes | yes |" in row for row in rows)
    assert f"{through} of {len(rows)} architectures" in README


def test_the_example_of_a_loss_trains(tmp_path):
    import torch

    from robust_prune.attacks import ThreatModel
    from robust_prune.recipe import TrainSettings
    from robust_prune.training.losses import Batch, make_loss

    code = re.search(r"<!-- example: my_loss.py -->\n```python\n(.*?)```", PAGES["training.md"], re.DOTALL)
    assert code is not None
    (tmp_path / "my_loss.py").write_text(code[1], encoding="utf-8")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    batch = Batch(torch.rand(8, 3, 4, 4), torch.arange(8) % 3, ThreatModel(), torch.Generator(), model)
    loss = make_loss(TrainSettings(loss=f"{tmp_path / 'my_loss.py'}:mixed"))
    result = loss(model, batch)
    result.loss.backward()
    assert model[1].weight.grad.abs().sum() > 0 and result.logits.shape == (8, 3)


def test_links_into_the_repository_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert all(target.startswith("https://") for target in targets), "a package index knows no relative links"
    linked = re.findall(REPOSITORY + r"([^)\s#]+)", EVERYTHING)
    assert any(target.endswith(".png") for target in linked)
    for target in linked:
        assert (ROOT / target).exists(), target


def test_the_lines_for_python_run(tmp_path, monkeypatch, capsys):
    """As they stand, on a part of the sample's images."""
    from dataclasses import replace

    import robust_prune.api as api
    from robust_prune.data.base import stratified
    from robust_prune.data.sample import load_sample

    code = re.search(r"<!-- example: python -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    whole = load_sample()
    train, validation, test = (
        stratified(part, n) for part, n in ((whole.train, 12), (whole.validation, 6), (whole.test, 6))
    )
    few = replace(whole, train=train, validation=validation, test=test)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_data", lambda name: few)
    monkeypatch.setattr("robust_prune.evaluation.worst_case.APGD_STEPS", 10)
    monkeypatch.setattr("robust_prune.evaluation.passes.BLACK_BOX_QUERIES", 20)
    exec(code[1], {})
    assert (tmp_path / "small.onnx").is_file()
    assert "6 test images of sample" in capsys.readouterr().out
