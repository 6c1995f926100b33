"""Help, at once and for every verb."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from builders.commands import fails

from robust_prune import cli
from robust_prune.recipe import Recipe
from robust_prune.recipe_docs import default

VERBS = ("compress", "train", "sensitivity", "evaluate", "export", "bench", "report", "doctor", "recipes")


def shown(capsys, *arguments: str) -> str:
    """What a command prints at 80 columns, in one line."""
    cli.main(list(arguments))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    return " ".join(printed.replace("│", " ").split())


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_help_names_every_criterion(capsys):
    from robust_prune.catalogue import ALLOCATIONS, CRITERIA

    cli.main(["compress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in (*CRITERIA.names, *ALLOCATIONS.names))


def test_help_answers_without_importing_the_heavy_packages():
    code = (
        "import sys\nfrom robust_prune import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torch_pruning', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for verb in ("compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor", "recipes"):
        assert verb in ran.stdout


@pytest.mark.parametrize("verb", ["compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor"])
def test_every_verb_has_help(verb, capsys):
    cli.main([verb, "--help"])
    assert f"robust-prune {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [*VERBS[:-1], "recipes show", "recipes cp", "recipes explain", "recipes ls"])
def test_every_verb_shows_an_example(verb, capsys):
    assert f"Example: robust-prune {verb}" in shown(capsys, *verb.split(), "--help")


def test_flags_stand_in_groups(capsys):
    groups = {
        "compress": ("Model and data", "Threat model", "Pruning", "Recovery", "Evaluation", "Export", "Run"),
        "train": ("Model and data", "Threat model", "Training", "Evaluation", "Run"),
        "evaluate": ("Model and data", "Threat model", "Evaluation", "Run"),
        "sensitivity": ("Model and data", "Threat model", "Sensitivity", "Run"),
        "export": ("Model and data", "Export", "Run"),
        "bench": ("Measurement", "Run"),
    }
    for verb, names in groups.items():
        text = shown(capsys, verb, "--help")
        places = [text.index(f"╭─ {name} ─") for name in names]
        assert places == sorted(places) and text.count("╭─") == len(names), verb


def test_defaults_are_those_of_the_recipe(capsys):
    recipe = Recipe()
    assert default("threat.epsilon") == "8/255" and default("evaluation.images", "all") == "all"
    text = shown(capsys, "compress", "--help")
    for flag, value in {
        "--ratio": recipe.pruning.ratio, "--metric": recipe.pruning.metric, "--cuts": recipe.pruning.cuts,
        "--epochs": recipe.finetune.epochs, "--loss": recipe.finetune.loss, "--tier": recipe.evaluation.tier,
        "--images": "all", "--epsilon": "the model's, or 8/255", "--seed": recipe.seed, "--precision": "none",
    }.items():  # fmt: skip
        found = re.search(rf" {flag} [A-Z]+ (.*?)( --|╰)", text)
        assert found is not None and f"[default: {value}]" in found[1], flag
    assert f"[default: {recipe.training.epochs}]" in shown(capsys, "train", "--help")
    assert f"[default: {recipe.evaluation.steps}]" in shown(capsys, "evaluate", "--help")
    for verb in VERBS[:-1]:
        assert "[default: False]" not in shown(capsys, verb, "--help")


def test_the_options_of_all_commands_are_listed(capsys):
    text = shown(capsys, "--help")
    assert all(option in text for option in ("--debug", "--install-completion", "--version", *VERBS))


def test_completion_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.main(["--install-completion", "--shell", "bash"])
    script = tmp_path / ".local" / "share" / "bash-completion" / "completions" / "robust-prune"
    assert str(script) in capsys.readouterr().out.replace("\n", "") and "--ratio" in script.read_text()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    code, message = fails(capsys, "--install-completion", "--shell", "bash")
    assert code == 3 and message.startswith("error: cannot write the completion script")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["compress"],
            "compress needs a model: robust-prune compress MODEL, e.g. robust-prune compress demo --ratio 0.5",
        ),
        (["evaluate", "--tier", "pgd"], "evaluate needs a model: robust-prune evaluate MODEL, e.g. robust-prune eval"),
        (["sensitivity"], "sensitivity needs a model"),
        (["export"], "export needs a model"),
        (["recipes", "cp", "demo"], "recipes cp needs a file to write to: robust-prune recipes cp NAME TO, e.g."),
        (["compress", "demo", "--ratio"], "robust-prune compress: --ratio needs a value"),
        (["compress", "demo", "--epsilom", "3"], "has no option --epsilom. Did you mean --epsilon?"),
        (["compress", "demo", "--eps=3"], "has no option --eps. Did you mean --epsilon?"),
        (["export", "demo", "--epsilon", "3"], "has no option --epsilon. `robust-prune export --help` lists all."),
        (["compress", "demo", "other"], "robust-prune compress does not take 'other'."),
        (["compres"], 'Did you mean "compress"?'),
    ],
)
def test_what_is_missing_or_unknown_is_named(capsys, arguments, wanted):
    code, message = fails(capsys, *arguments)
    assert code == 2 and wanted in message and message.count("\n") == 1
