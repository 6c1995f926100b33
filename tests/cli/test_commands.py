"""What the commands make of their flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust_prune import cli, compression
from robust_prune.attacks import ThreatModel
from robust_prune.models import artifact, registry


def test_a_recovery_preset_stands_over_the_recipe_and_under_the_flags(here, monkeypatch):
    seen = []
    monkeypatch.setattr(compression, "compress", lambda job: seen.append(job.recipe.finetune))
    for more in ([], ["--recovery", "best"], ["--recovery", "best", "--epochs", "2", "--set", "finetune.awp=0"]):
        cli.main(["compress", "demo", "--out", "run", *more])
    of_the_recipe, best, mixed = seen
    assert of_the_recipe.loss == "n_fgsm" and best.loss == mixed.loss == "pgd_at"
    assert best.lr == of_the_recipe.lr and best.epochs > of_the_recipe.epochs
    assert (mixed.epochs, mixed.awp, best.awp > 0) == (2, 0, True)


def test_recipes_are_listed_shown_and_copied(here, capsys):
    cli.main(["recipes", "ls"])
    assert "demo" in capsys.readouterr().out
    cli.main(["recipes", "show", "demo"])
    assert "robust-prune compress demo" in capsys.readouterr().out
    cli.main(["recipes", "show", "demo", "--resolved"])
    assert "min_keep" in capsys.readouterr().out
    cli.main(["recipes", "cp", "demo", "mine.yaml"])
    assert (here / "mine.yaml").exists()


def test_the_demo_goes_with_any_recipe():
    from robust_prune.commands.common import open_model_for
    from robust_prune.recipe_reader import load

    recipe = load(None, {"model.arch": "cifar/resnet18"})
    assert open_model_for("demo", None, recipe, None).spec.arch == "cifar/resnet20_x2"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ThreatModel("l2", 0.5)),
        (["--epsilon", "4/255"], ThreatModel("l2", 4 / 255)),
        (["--norm", "l2", "--epsilon", "1"], ThreatModel("l2", 1.0)),
        (["--norm", "linf", "--epsilon", "2/255"], ThreatModel("linf", 2 / 255)),
        (["--set", "threat={norm: linf, epsilon: 2/255}"], ThreatModel("linf", 2 / 255)),
        (["--recipe", "demo"], ThreatModel("l2", 0.5)),
    ],
)
def test_the_threat_model_is_the_models_unless_another_is_named(here, monkeypatch, capsys, flags, expected):
    spec = registry.make_spec(
        "cifar/resnet20_x0.25", num_classes=10, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    artifact.save(Path("l2.safetensors"), registry.build(spec).eval(), spec, threat=ThreatModel("l2", 0.5))
    seen = []
    monkeypatch.setattr(compression, "compress", lambda job: seen.append(job.recipe.threat_model))
    cli.main(["compress", "l2.safetensors", "--data", "sample", "--out", "run", *flags])
    assert seen == [expected]
    told = "Threat model: L2" in capsys.readouterr().out
    assert told == (expected.norm == "l2" and "--norm" not in flags)
    with pytest.raises(SystemExit) as ended:
        cli.main(["compress", "l2.safetensors", "--data", "sample", "--out", "run", "--norm", "linf"])
    assert ended.value.code == 2 and "norm linf needs a radius of its own, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--arch", "cifar/resnet20", "--data", "sample", "--norm", "l2"])
    assert "norm l2 needs a radius of its own, got none. Add --epsilon (0.5 is usual)" in capsys.readouterr().err
