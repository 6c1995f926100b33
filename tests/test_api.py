"""The front door for Python hands on what it was given; `end_to_end/test_api.py` walks through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.recorded import PREPARED

import robust_prune as rp
from robust_prune import api
from robust_prune.data.base import stratified
from robust_prune.errors import UsageError
from robust_prune.structure.types import Skipped

TRAINED_FOR = rp.ThreatModel("l2", 0.25)


@pytest.fixture
def model() -> rp.Model:
    return replace(PREPARED.dense, module=PREPARED.reopened(), threat=TRAINED_FOR)


@pytest.fixture
def data() -> rp.DataBundle:
    return PREPARED.bundle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stages are called with, by their name in `api`."""
    seen: dict[str, Any] = {}

    def recorder(name: str, answer: Any) -> Any:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            seen[name] = (arguments, keywords)
            return answer

        return noted

    for name, answer in {
        "_analyse": PREPARED.analysis, "train": "tuned", "_evaluate": "card", "export_model": "file", "repair": None,
        "run_section": "table", "_compress": "done",
    }.items():  # fmt: skip
        monkeypatch.setattr(api, name, recorder(name, answer))
    return seen


def test_analysis_takes_training_images_and_the_recipe_that_is_named(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], tmp_path: Path
) -> None:
    assert rp.analyse(model, data, sensitivity__images=32) is PREPARED.analysis
    (known,), _ = asked["_analyse"]
    assert (known.model, known.spec, known.images, known.device) == (model.module, model.spec, data.train, "cpu")
    recipe = known.recipe
    assert recipe.sensitivity.images == 32 and recipe.threat_model == TRAINED_FOR
    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 3\nthreat: {norm: linf, epsilon: 2/255}\n")
    rp.analyse(model, data, recipe=str(mine), sensitivity__steps=2)
    recipe = asked["_analyse"][0][0].recipe
    assert (recipe.seed, recipe.sensitivity.steps, recipe.threat_model) == (3, 2, rp.ThreatModel("linf", 2 / 255))


def test_a_plan_takes_its_ratio_and_section_and_no_latency() -> None:
    plan = rp.plan(PREPARED.analysis, ratio=0.3, metric="params", allocation="uniform")
    assert (plan.ratio, plan.metric, plan.allocation) == (0.3, "params", "uniform")
    assert rp.plan(PREPARED.analysis).ratio == 0.5
    with pytest.raises(UsageError, match="a latency budget needs exported candidates"):
        rp.plan(PREPARED.analysis, metric="latency")


def test_pruning_repairs_on_training_images_and_names_what_stayed_whole(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(model, provenance={"from": "here"})
    small = rp.prune(model, PREPARED.plan, data, pruning__repair="none")
    (_, dense, images, recipe, _), _ = asked["repair"]
    assert dense is model.module and images is data.train and recipe.pruning.repair == "none"
    assert small.provenance == {"from": "here"} and small.threat == TRAINED_FOR
    assert sum(p.numel() for p in small.module.parameters()) == PREPARED.plan.params_after
    whole = replace(PREPARED.surgery, rolled_back=(Skipped("backbone.conv1", "why"),))
    monkeypatch.setattr(api, "apply", lambda *_: whole)
    small = rp.prune(model, PREPARED.plan, data)
    assert small.provenance == {"from": "here", "rolled_back": {"backbone.conv1": "why"}}


def test_fine_tuning_takes_the_teacher_the_threat_and_the_held_out_images(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any]
) -> None:
    model.module.train()
    teacher = replace(model, module=PREPARED.reopened())
    assert rp.finetune(model, data, teacher=teacher, epochs=2, distillation=0.5) == "tuned"
    (module, images, held_out, threat, settings), keywords = asked["train"]
    assert module is model.module and (images, held_out, threat) == (data.train, data.validation, TRAINED_FOR)
    assert (settings.epochs, settings.distillation, settings.crop_padding) == (2, 0.5, 0)
    assert keywords == {"device": "cpu", "teacher": teacher.module} and not model.module.training
    rp.finetune(model, data, threat=4 / 255)
    (_, _, _, threat, _), keywords = asked["train"]
    assert threat == rp.ThreatModel("linf", 4 / 255) and keywords["teacher"] is None


def test_evaluation_takes_a_sample_of_the_test_images_the_seed_and_the_models_threat(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(model.module, "to", lambda where: moved.append(str(where)) or model.module)
    assert rp.evaluate(model, data, seed=5, images=10, tier="apgd") == "card"
    (_, images, threat, section), keywords = asked["_evaluate"]
    chosen = stratified(data.test, 10)
    assert torch.equal(images.get(torch.arange(10))[0], chosen.get(torch.arange(10))[0]) and len(images) == 10
    assert (threat, section.tier, keywords["seed"]) == (TRAINED_FOR, "apgd", 5)
    assert keywords["subject"] == api.Subject(model.spec.arch, "toy", "test")
    assert moved == ["cpu", "cpu"], "the model does not come back to where it was"
    rp.evaluate(replace(model, threat=None), data)
    assert asked["_evaluate"][0][2] == rp.ThreatModel()


def test_exports_and_timings_take_their_sections(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], tmp_path: Path
) -> None:
    assert rp.export(model, tmp_path / "m.onnx", data, opset=20) == "file"
    (module, spec, images, path, section, _), _ = asked["export_model"]
    assert (module, spec, images, path) == (model.module, model.spec, data.train, tmp_path / "m.onnx")
    assert section.opset == 20
    assert rp.benchmark({"a": "a.onnx", "b": "b.onnx"}, seed=4, batches=(2,)) == "table"
    (files, section, seed), _ = asked["run_section"]
    assert files == [("a", "a.onnx"), ("b", "b.onnx")] and (section.batches, seed) == ((2,), 4)


def test_the_whole_job_is_made_of_what_was_given(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rp.compress(model, data, ratio=0.3, out=str(tmp_path), name="mine", finetune__epochs=2) == "done"
    (job,), _ = asked["_compress"]
    assert (job.name, job.dense, job.data, job.out) == ("mine", model, data, tmp_path)
    assert (job.recipe.pruning.ratio, job.recipe.finetune.epochs) == (0.3, 2)
    assert job.recipe.threat_model == TRAINED_FOR
    rp.compress(model, data, threat=1 / 255)
    (job,), _ = asked["_compress"]
    assert job.recipe.threat_model == rp.ThreatModel("linf", 1 / 255) and job.recipe.pruning.ratio == 0.5
    monkeypatch.setattr(api, "_compress", lambda job: None)  # a process that is not the first
    with pytest.raises(SystemExit) as left:
        rp.compress(model, data)
    assert left.value.code == 0


def test_a_saved_model_keeps_its_threat_and_where_it_came_from(model: rp.Model, tmp_path: Path) -> None:
    rp.save(replace(model, provenance={"from": "here"}), tmp_path / "m.safetensors")
    again = rp.load(tmp_path / "m.safetensors")
    assert (again.threat, again.provenance, again.spec) == (TRAINED_FOR, {"from": "here"}, model.spec)


def test_a_model_is_opened_with_what_was_said_of_it(monkeypatch: pytest.MonkeyPatch, data: rp.DataBundle) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(api, "open_model", lambda *arguments, **keywords: asked.append((arguments, keywords)))
    monkeypatch.setattr(api.artifact, "load", lambda *arguments, **keywords: asked.append((arguments, keywords)))
    rp.load("m.pt", arch="cifar/resnet20", data=data, trust_pickle=True)
    like = torch.nn.Identity()
    rp.load("m.safetensors", like=like)
    assert asked == [
        (("m.pt",), {"arch": "cifar/resnet20", "normalization": "auto", "trust_pickle": True, "data": data}),
        (("m.safetensors",), {"arch": None, "like": like}),
    ]


def test_a_radius_that_cannot_be_meant_is_refused_before_any_attack(
    model: rp.Model, data: rp.DataBundle, asked: dict[str, Any], tmp_path: Path
) -> None:
    for refused in (
        lambda: rp.evaluate(model, data, 8),
        lambda: rp.evaluate(model, data, 4 / 255, sweep=(2 / 255, 8)),
        lambda: rp.finetune(model, data, threat=8),
        lambda: rp.compress(model, data, threat=8),
        lambda: rp.compress(model, data, threat__norm="linf", threat__epsilon=8),
        lambda: rp.analyse(model, data, threat__norm="linf", threat__epsilon=8),
    ):
        with pytest.raises(UsageError, match=r"Did you mean 8/255\?"):
            refused()
    with pytest.raises(UsageError, match="norm linf needs a radius of its own"):
        rp.compress(model, data, threat__norm="linf")
    with pytest.raises(UsageError, match=r"at most .* for l2"):
        rp.evaluate(model, data, rp.ThreatModel("l2", 128))
    with pytest.raises(UsageError, match="the threat of a model is a ThreatModel or None, got 8"):
        rp.save(replace(model, threat=8), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    assert not asked and not list(tmp_path.iterdir())


def test_values_of_the_wrong_kind_are_refused_in_one_line(model: rp.Model, data: rp.DataBundle) -> None:
    front: Any = rp
    for refused, words in (
        (lambda: front.compress(3, data), "a model is a Model"),
        (lambda: front.compress(model, 3), "data are a name"),
        (lambda: front.compress(model, data, out=7), "out is a folder such as 'runs/half'; got builtins.int"),
        (lambda: front.compress(model, data, recipe=7), "recipe is a file"),
        (lambda: front.load_data(7), "data are a name"),
        (lambda: front.evaluate(model, data, threat="x"), "a threat is a ThreatModel"),
        (lambda: front.evaluate(model, data, seed="x"), "seed is a whole number"),
        (lambda: front.load(7), "a model is opened from a file, or 'demo'; got builtins.int"),
        (lambda: front.load("m.pt", arch=7), "arch is a text"),
        (lambda: front.load("m.pt", like=3), "like is the torch module"),
        (lambda: front.plan("x"), "plan takes the result of analyse"),
        (lambda: front.prune(model, "x", data), "prune takes the result of plan"),
        (lambda: front.export(model, 7, data), "path is a file"),
        (lambda: front.benchmark(["a.onnx"]), "files are paths by label"),
        (lambda: front.benchmark({"a": 7}), "a file to time is a path"),
        (lambda: front.save(model, 7), "path is a file"),
    ):
        with pytest.raises(UsageError, match=words):
            refused()
