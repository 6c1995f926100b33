"""What the commands make of their flags."""

from __future__ import annotations

from robust_prune import cli, compression


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
