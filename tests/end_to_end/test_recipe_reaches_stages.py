"""Every value of a recipe changes what the stage is given that it is for.

The stages are replaced by recorders (`builders.recorded`); that they do something with what they are given is the
business of `test_recipe_takes_effect.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from builders.recorded import recorded
from pydantic import BaseModel

from robust_prune.recipe import Recipe
from robust_prune.runs.cache import Cache


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values of a recipe."""
    for name, found in model.model_fields.items():
        if isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel):
            yield from leaves(found.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


@dataclass(frozen=True)
class Case:
    """Another legal value, the stages that must notice it, and what else the recipe says for them to run at all."""

    value: Any
    stages: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    command: str = "compress"


SCRATCH = {"baseline.kind": "scratch"}
ATTACKS = (
    "check of the dense model",
    "adversarial set", "attacked images of the repair", "fine-tuning", "evaluation", "examples",
    "length from scratch",
)  # fmt: skip
DRAWS = (
    "check of the dense model",
    "adversarial set", "clean images", "channel scores", "attacked images of the repair", "clean images of the repair",
    "fine-tuning", "evaluation", "fresh weights", "images from scratch", "export", "latency",
    "examples",
)  # fmt: skip
TRAIN_SETTINGS = {
    "loss": "trades", "epochs": 7, "batch_size": 16, "lr": 0.03, "warmup": 0.4, "momentum": 0.5, "weight_decay": 0.01,
    "steps": 3, "beta": 2.0, "distillation": 0.5, "temperature": 3.0, "awp": 0.01, "awp_warmup": 0.3,
    "label_smoothing": 0.0, "ema_decay": 0.5, "clip_grad": 1.0, "crop_padding": 2, "flip": False,
    "resized_crop": 0.5,
    "validation_images": 10, "validation_steps": 3, "precision": "fp32", "compile": "on", "workers": 1,
    "trackers": ["tensorboard"],
}  # fmt: skip
EVALUATION = {
    "tier": "apgd", "steps": 3, "restarts": 5, "sweep": [0.1], "images": 10, "batch_size": 7, "precision": "bf16"
}  # fmt: skip
TRAINED = ("training", "evaluation of what was trained")

CASES: dict[str, tuple[Case, ...]] = {
    "seed": (Case(5, DRAWS, SCRATCH), Case(5, TRAINED, command="train")),
    "device": (Case("cuda", ("device",)), Case("cuda", ("device of training",), command="train")),
    "data.name": (Case("other.npz", ("data",)),),
    "data.root": (Case("elsewhere", ("data",)),),
    "data.validation": (Case(11, ("data",)),),
    "data.image_size": (Case(24, ("data",)),),
    "data.crop_fraction": (Case(0.875, ("data",)),),
    "data.class_order": (Case("natural", ("data",)),),
    "threat.norm": (
        Case("l2", (*ATTACKS, "artifact"), SCRATCH), Case("l2", (*TRAINED, "artifact"), command="train")
    ),
    "threat.epsilon": (
        Case(0.1, (*ATTACKS, "artifact"), SCRATCH), Case(0.1, (*TRAINED, "artifact"), command="train")
    ),
    "model.arch": (
        Case("cifar/resnet20_x0.5", ("model",)), Case("cifar/resnet20_x0.5", ("architecture",), command="train")
    ),
    "model.kwargs": (Case({"a": 1}, ("model",)), Case({"a": 1}, ("architecture",), command="train")),
    "model.normalization": (Case("none", ("model",)), Case("0.5/0.5", ("architecture",), command="train")),
    "sensitivity.estimator": (Case("gradient", ("sensitivity",)),),
    "sensitivity.images": (Case(17, ("adversarial set", "clean images")),),
    "sensitivity.steps": (Case(3, ("adversarial set", "attacked images of the repair")),),
    "sensitivity.rho": (Case(0.2, ("sensitivity",)),),
    "sensitivity.ascent_steps": (Case(3, ("sensitivity",), {"sensitivity.estimator": "ascent"}),),
    "sensitivity.aggregation": (Case("max", ("sensitivity",)),),
    "pruning.ratio": (
        Case(0.3, ("plan",)), Case(0.3, ("plan for a latency",), {"pruning.metric": "latency"})
    ),
    "pruning.metric": (Case("params", ("plan",)), Case("latency", ("candidate clock", "plan for a latency"))),
    "pruning.allocation": (Case("uniform", ("plan",)),),
    "pruning.criterion": (Case("magnitude", ("channel scores",)),),
    "pruning.round_to": (Case(1, ("plan",)),),
    "pruning.mrs_exponent": (Case(1.0, ("plan",)),),
    "pruning.min_keep": (Case(0.4, ("plan",)),),
    "pruning.keep": (Case(["layer1"], ("plan",)),),
    "pruning.limits": (Case({"layer1": 0.1}, ("plan",)),),
    "pruning.branches": (Case(False, ("plan",)),),
    "pruning.cuts": (Case(2, ("plan",)), Case(2, ("plan for a latency",), {"pruning.metric": "latency"})),
    "pruning.epochs_between": (Case(9, ("fine-tuning",), {"pruning.cuts": 2}),),
    "pruning.repair": (Case("batchnorm", ("batch-norm repair",)), Case("none", ("least-squares repair",))),
    "pruning.repair_images": (
        Case(16, ("attacked images of the repair", "clean images of the repair")),
        Case(16, ("batch-norm repair",), {"pruning.repair": "batchnorm"}),
    ),
    **{f"training.{name}": (
        Case(value, ("training",), command="train"), Case(value, ("length from scratch",), SCRATCH)
    ) for name, value in TRAIN_SETTINGS.items()},
    **{f"finetune.{name}": (Case(value, ("fine-tuning",)),) for name, value in TRAIN_SETTINGS.items()},
    "baseline.kind": (Case("scratch", ("fresh weights", "length from scratch")),),
    "baseline.minutes": (Case(3.0, ("length from scratch",), SCRATCH),),
    **{f"evaluation.{name}": (
        Case(value, ("evaluation",)), Case(value, ("evaluation of what was trained",), command="train")
    ) for name, value in EVALUATION.items()},
    "export.opset": (Case(20, ("export",)),),
    "export.precisions": (Case(["fp16"], ("lower precisions",)),),
    "export.calibration_images": (Case(20, ("lower precisions",), {"export.precisions": ("int8",)}),),
    "bench.batches": (Case([2], ("latency",)),),
    "bench.threads": (Case([2], ("latency",)),),
    "bench.provider": (Case("cuda", ("check of the provider", "latency")),),
    "bench.kinds": (Case(["device"], ("check of the provider", "latency")),),
    "bench.seconds": (Case(3.0, ("latency",)),),
}  # fmt: skip
"""A new value of a recipe belongs here, or its test fails."""


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, Any]]:
    """What the stages of a case are given before its value is changed."""

    @cache
    def run(command: str, given: tuple[tuple[str, Any], ...], stages: tuple[str, ...]) -> dict[str, Any]:
        return recorded(command, dict(given), tmp_path_factory.mktemp("unchanged") / "run", stages).first

    return lambda case: run(case.command, tuple(case.given.items()), case.stages)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Cache]:
    """The cache that a run of a case leaves before its value is changed."""

    @cache
    def run(given: tuple[tuple[str, Any], ...], until: tuple[str, ...]) -> Cache:
        store = Cache(tmp_path_factory.mktemp("filled"))
        recorded("compress", dict(given), tmp_path_factory.mktemp("unchanged") / "run", until, cache=store)
        return store

    # The prepared groups are those of the dense model, so that no run gets through a second cut.
    return lambda case: run(tuple(case.given.items()), case.stages if "pruning.cuts" in case.given else ())


@pytest.mark.parametrize("name", leaves(Recipe))
def test_every_value_reaches_its_stages(
    name: str, unchanged: Callable[[Case], dict[str, Any]], filled: Callable[[Case], Cache], tmp_path: Path
) -> None:
    for number, case in enumerate(CASES[name]):
        before = unchanged(case)
        after = recorded(
            case.command, {**case.given, name: case.value}, tmp_path / str(number) / "run", case.stages
        ).first
        for stage in case.stages:
            assert stage in before or stage in after, f"no run got as far as the {stage}"
            assert before.get(stage) != after.get(stage), f"{name} does not reach the {stage}"
        if case.command == "compress":
            given, folder = {**case.given, name: case.value}, tmp_path / f"cached {number}" / "run"
            cached = recorded("compress", given, folder, case.stages, cache=filled(case)).first
            for stage in case.stages:
                assert cached.get(stage) == after.get(stage), f"with another {name} the {stage} is taken from the cache"


def test_a_second_run_does_nothing_of_the_dense_model_again(tmp_path: Path) -> None:
    """Or the cache would hold nothing that the test above could find."""
    store = Cache(tmp_path / "cache")
    first = recorded("compress", {}, tmp_path / "one", cache=store).called
    second = recorded("compress", {"pruning.ratio": 0.75}, tmp_path / "two", cache=store).called
    dense = {
        "groups", "adversarial set", "sensitivity", "channel scores", "attacked images of the repair",
        "check of the dense model",
    }  # fmt: skip
    assert dense <= set(first) and not dense & set(second)
    for stage, times in {"export": 1, "evaluation": 1}.items():
        assert first.count(stage) - second.count(stage) == times, f"the {stage} of the dense model"


@pytest.mark.parametrize("command", ["compress", "train"])
def test_what_is_recorded_is_the_same_for_the_same_recipe(command: str, tmp_path: Path) -> None:
    """Or a difference would show nothing."""
    given = {**SCRATCH, "export.precisions": ["fp16"]}
    one, two = (recorded(command, given, tmp_path / name / "run").first for name in ("one", "two"))
    assert one == two
    assert len(one) > (25 if command == "compress" else 5)


def test_no_value_is_named_that_a_recipe_does_not_have() -> None:
    assert set(CASES) == set(leaves(Recipe))
