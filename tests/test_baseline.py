"""The small network from scratch beside the cut: fresh weights in the pruned shape, for as long as recovery took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import QUICK, write_data, write_model

from robust_prune import cli
from robust_prune.attacks import ThreatModel
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import cost_model
from robust_prune.budget.plan import make_plan
from robust_prune.data.base import TensorImages
from robust_prune.models import registry
from robust_prune.ranking.importance import channel_scores
from robust_prune.recipe import PruningSection, TrainSettings
from robust_prune.structure.groups import find_groups
from robust_prune.surgery.apply import apply
from robust_prune.training import budget
from robust_prune.training.scratch import fresh_like
from robust_prune.training.trainer import train as real_train


@pytest.mark.parametrize("arch", ["cifar/resnet20", "cifar/mobilevit_xs"])
def test_a_fresh_model_has_the_pruned_shape_and_weights_of_its_own(arch: str) -> None:
    spec = registry.make_spec(arch, num_classes=10, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    torch.manual_seed(5)
    dense, example = registry.build(spec).eval(), torch.zeros(1, 3, 32, 32)
    search = find_groups(dense, example)
    cost, scores = cost_model(dense, example, search.groups), channel_scores(dense, search.groups, "magnitude")
    plan = make_plan(Analysis(search, cost, None, scores), PruningSection(allocation="uniform"))
    pruned = apply(dense, plan, example).model
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    first, again, other = (fresh_like(spec, pruned, seed) for seed in (0, 0, 1))
    assert {n: t.shape for n, t in first.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    kernels = [name for name, parameter in first.named_parameters() if parameter.ndim > 1]
    assert not any(torch.equal(first.state_dict()[name], before[name]) for name in kernels)
    assert not any(torch.equal(first.state_dict()[name], other.state_dict()[name]) for name in kernels)
    assert all(torch.equal(tensor, pruned.state_dict()[name]) for name, tensor in before.items())
    logits = first(torch.rand(4, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (4, 10) and logits.isfinite().all()


def test_training_is_as_long_as_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    images = TensorImages(torch.randint(0, 255, (100, 3, 8, 8), dtype=torch.uint8), torch.arange(100) % 3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    seen = []

    def timed(model, few, *args, **kwargs):
        seen.append(len(few))
        result = real_train(model, few, *args, **kwargs)
        # A second for eighty images, whatever this machine takes.
        record = result.history[0].__class__(**{**vars(result.history[0]), "seconds": 1.0})
        return result.__class__((record,), result.best_epoch)

    monkeypatch.setattr(budget, "train", timed)
    settings = TrainSettings(loss="clean", batch_size=4, precision="fp32")
    threat, weights = ThreatModel("linf", 0.1), [p.clone() for p in model.parameters()]
    assert [budget.affordable(model, images, threat, settings, s) for s in (1.0, 5.0, 0.001)] == [
        (1, 80),
        (4, 100),
        (1, 4),
    ]
    assert seen == [80, 80, 80]
    assert all(torch.equal(before, now) for before, now in zip(weights, model.parameters(), strict=True))


def test_compress_shows_the_network_from_scratch_and_resumes_its_length(tmp_path: Path, capsys) -> None:
    data, (source, weights) = write_data(tmp_path / "data.npz"), write_model(tmp_path)
    out = tmp_path / "run"
    command = [
        "compress", str(weights), "--arch", f"{source}:make_model", "--data", str(data), "--ratio", "0.5",
        "--epochs", "2", "--baseline", "scratch", "--out", str(out), *QUICK,
        "--set", "training.batch_size=32", "--set", "training.validation_images=30", "--set", "baseline.minutes=0.02",
    ]  # fmt: skip
    cli.main(command)
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    labels = {model["label"]: model for model in result["models"]}
    assert list(labels) == ["dense", "pruned", "scratch"]
    assert labels["scratch"]["macs"] == labels["pruned"]["macs"] < labels["dense"]["macs"]
    assert "scratch" in printed and "from fresh weights, trained by n_fgsm for" in " ".join(printed.split())
    length = json.loads((out / "scratch-length" / "stage.json").read_text())
    (out / "scratch" / "stage.json").unlink()
    first = torch.load(out / "scratch" / "checkpoint.pt", weights_only=True)["key"]
    cli.main(command)
    assert json.loads((out / "scratch-length" / "stage.json").read_text()) == length
    assert torch.load(out / "scratch" / "checkpoint.pt", weights_only=True)["key"] == first
    assert "starts over" not in capsys.readouterr().out
