"""The front door for Python: short, typed, and clear about what it cannot take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.data_files import everything
from builders.toy import MODEL_FILE, write_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robust_prune as rp
from robust_prune.errors import UsageError

FEW = {
    "sensitivity__images": 32, "sensitivity__steps": 2, "pruning__repair_images": 32, "evaluation__steps": 2,
    "finetune__epochs": 1, "finetune__batch_size": 32, "finetune__validation_images": 20, "bench__seconds": 0.2,
    "bench__batches": (1,),
}  # fmt: skip


class Net(nn.Module):
    """A user's own module, normalization inside."""

    def __init__(self) -> None:
        super().__init__()
        scope: dict = {}
        exec(MODEL_FILE, scope)
        self.net = scope["make_model"](3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.3) / 0.2)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    with np.load(write_data(tmp_path_factory.mktemp("data") / "toy.npz")) as stored:
        return dict(stored)


@pytest.fixture
def data(arrays: dict[str, np.ndarray]) -> rp.DataBundle:
    return rp.load_data(
        {"train": (arrays["x_train"], arrays["y_train"]), "test": (arrays["x_test"], arrays["y_test"])}, name="toy"
    )


def test_the_story_step_by_step(data: rp.DataBundle, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net()
    before = module(torch.rand(2, 3, 16, 16)).shape
    analysis = rp.analyse(module, data, sensitivity__images=32, sensitivity__steps=2)
    plan = rp.plan(analysis, ratio=0.5, round_to=1)
    assert plan.criterion == "adversarial_taylor"
    with pytest.raises(UsageError, match=r"criterion cannot change a plan.*analyse\("):
        rp.plan(analysis, criterion="magnitude")
    small = rp.prune(module, plan, data, pruning__repair_images=32)
    assert sum(p.numel() for p in small.module.parameters()) == plan.params_after < plan.params_before
    assert module(torch.rand(2, 3, 16, 16)).shape == before
    tuned = rp.finetune(small, data, epochs=1, batch_size=32, threat=4 / 255)
    assert len(tuned.history) == 1 and tuned.history[0].seconds > 0
    card = rp.evaluate(small, data, 4 / 255, steps=2, images=30)
    assert card.clean.total == 30 and card.threat == rp.ThreatModel("linf", 4 / 255)
    file = rp.export(small, tmp_path / "small.onnx", data)
    assert file.parity.passed
    table = rp.benchmark({"small": file.path}, batches=(1,), seconds=0.2)
    for value in (data, analysis, plan, small, tuned, card, table):
        assert len(repr(value)) < 300, repr(value)
    for value in (analysis, plan, table):
        assert "<pre" in value._repr_html_()
    rp.save(small, tmp_path / "small.safetensors")
    again = rp.load(tmp_path / "small.safetensors", like=Net())
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(again(images), small.module.eval()(images))


def test_the_whole_job_goes_on_where_it_was(data: rp.DataBundle, tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    module = Net()
    done = rp.compress(module, data, ratio=0.5, out=tmp_path / "run", threat=4 / 255, name="net", **FEW)
    assert done.report.models[1].macs < 0.6 * done.report.models[0].macs
    assert "net compressed" in repr(done) and "pruned" in done._repr_html_()
    monkeypatch.setattr("robust_prune.compression.train", lambda *_, **__: pytest.fail("trained again"))
    again = rp.compress(module, data, ratio=0.5, out=tmp_path / "run", threat=4 / 255, name="net", **FEW)
    assert again.report.models == done.report.models


def test_a_model_of_another_process_asks_for_its_object(data: rp.DataBundle, tmp_path: Path, monkeypatch) -> None:
    from robust_prune.models import registry

    plan = rp.plan(rp.analyse(Net(), data, sensitivity__images=16, sensitivity__steps=1), allocation="uniform")
    rp.save(rp.prune(Net(), plan, data, pruning__repair="none"), tmp_path / "m.safetensors")
    monkeypatch.setattr(registry, "_OBJECTS", {})
    with pytest.raises(UsageError, match=r"was a Python object .* like=module"):
        rp.load(tmp_path / "m.safetensors")
    assert rp.load(tmp_path / "m.safetensors", like=Net()).spec.num_classes == 3


def test_datasets_floats_and_other_orders_are_the_same_images(arrays: dict[str, np.ndarray]) -> None:
    x, y = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    planes = x.permute(0, 3, 1, 2)
    for train in ((x, y), (planes, y), (planes.float() / 255, y.tolist()), TensorDataset(planes.float() / 255, y)):
        bundle = rp.load_data({"train": train, "test": (255 - x[:30], y[:30])}, validation=40)
        assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (200, 40, 30)
        assert torch.equal(bundle.test.get(torch.arange(2))[0], 255 - planes[:2])
        together = torch.cat([everything(part)[0] for part in (bundle.train, bundle.validation)])
        assert torch.equal(together.unique(dim=0), planes.unique(dim=0))
        assert bundle.input_size == (3, 16, 16) and bundle.num_classes == 3


def test_wrong_types_and_values_are_refused_before_any_work(data: rp.DataBundle, tmp_path: Path) -> None:
    cases = (
        (lambda: rp.evaluate(3, data), "a model is a Model, a torch module, 'demo' or a file; got builtins.int"),
        (lambda: rp.evaluate(Net(), [1]), "data are a name such as 'cifar10'.* got builtins.list"),
        (lambda: rp.evaluate(Net(), data, "8/255"), "a threat is a ThreatModel, or a number"),
        (lambda: rp.evaluate(Net(), data, steps=0), "evaluation.steps: input should be greater than or equal to 1"),
        (lambda: rp.evaluate(Net(), data, tire="pgd"), "unknown recipe key evaluation.tire. Did you mean tier"),
        (lambda: rp.evaluate(nn.Flatten(), data), "no parameters"),
        (lambda: rp.evaluate(nn.Linear(3, 3), data), "cannot run on 3x16x16 images of toy"),
        (lambda: rp.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), data), r"logits \(1, 3\) for toy"),
        (lambda: rp.finetune(Net(), data), "finetune trains a Model in place"),
        (lambda: rp.save(Net(), tmp_path / "m.pt"), "save writes a Model"),
        (lambda: rp.compress(Net(), data, ratio=1.5), r"ratio must be in \(0, 1\), got 1.5"),
        (lambda: rp.load_data({"train": (1, 2)}), "data need 'train' and 'test'"),
        (lambda: rp.load_data({"train": 3, "test": 3}), "train must be a torch Dataset or a pair"),
        (
            lambda: rp.load_data({"train": (torch.rand(4, 3, 8, 8) * 3, [0, 1] * 2), "test": ()}),
            r"train images must be uint8, or float in \[0, 1\]",
        ),
    )
    for call, message in cases:
        with pytest.raises(UsageError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_users_criterion_and_allocation_are_files_of_their_own(data: rp.DataBundle, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from robust_prune.budget.allocation import Wish\n"
        "def last_first(asked):\n"
        "    import torch\n"
        "    return {g.name: torch.arange(g.channels).flip(0) + 1.0 for g in asked.groups}\n"
        "def nearly_all(problem):\n"
        "    return Wish(problem.largest(lambda t: t * problem.dense))\n"
        "def nonsense(asked):\n"
        "    return {}\n"
    )
    few = {"sensitivity__images": 16, "sensitivity__steps": 1}
    analysis = rp.analyse(Net(), data, pruning__criterion=f"{tmp_path / 'mine.py'}:last_first", **few)
    plan = rp.plan(analysis, allocation=f"{tmp_path / 'mine.py'}:nearly_all", round_to=1)
    for group in plan.groups:
        assert group.removed == tuple(range(group.keep, group.channels))
    with pytest.raises(UsageError, match="must return a dict with a tensor"):
        rp.analyse(Net(), data, pruning__criterion=f"{tmp_path / 'mine.py'}:nonsense", **few)


def test_a_run_with_another_version_of_a_users_file_is_another_run(data: rp.DataBundle, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    text = "import torch\ndef score(asked):\n    return {g.name: torch.%s(g.channels) for g in asked.groups}\n"
    source.write_text(text % "ones")
    torch.manual_seed(0)
    module, settings = Net(), {**FEW, "pruning__criterion": f"{source}:score", "out": tmp_path / "run"}
    rp.compress(module, data, **settings)
    source.write_text(text % "rand")
    with pytest.raises(UsageError, match="holds a run with another code"):
        rp.compress(module, data, **settings)


def test_what_does_not_belong_together_is_refused(data: rp.DataBundle, tmp_path: Path) -> None:
    demo, net = rp.load("demo"), Net()
    for call in (rp.analyse, rp.evaluate, lambda model, images: rp.export(model, tmp_path / "x.onnx", images)):
        with pytest.raises(UsageError, match="takes 3x32x32 images, the data have 3x16x16"):
            call(demo, data)
    with pytest.raises(UsageError, match="takes 3x32x32 images"):
        rp.finetune(demo, data)
    analysis = rp.analyse(net, data, sensitivity__images=16, sensitivity__steps=1)
    plan = rp.plan(analysis, round_to=1)
    small = rp.prune(net, plan, data, pruning__repair="none")
    with pytest.raises(
        UsageError, match=r"none of the plan's \d+ groups could be cut.*Plan from an analysis of this model"
    ):
        rp.prune(small, plan, data)
    with pytest.raises(UsageError, match="ratio was given twice"):
        rp.compress(net, data, ratio=0.5, pruning__ratio=0.3)


def test_a_function_of_a_user_that_fails_is_named_with_its_line(data: rp.DataBundle, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def broken(anything):\n    return 1 / 0\n\n\ndef greedy(problem):\n    problem.dense[:] = 1\n    return None\n"
    )
    net = Net()
    analysis = rp.analyse(net, data, sensitivity__images=16, sensitivity__steps=1)
    before = rp.plan(analysis, round_to=1)
    failed = r"mine\.py:broken failed: .*mine\.py:2: ZeroDivisionError"
    with pytest.raises(UsageError, match=failed):
        rp.plan(analysis, allocation=f"{mine}:broken")
    with pytest.raises(UsageError, match="must return a Wish, got None"):
        rp.plan(analysis, allocation=f"{mine}:greedy")
    assert rp.plan(analysis, round_to=1) == before
    with pytest.raises(UsageError, match=failed):
        rp.analyse(net, data, pruning__criterion=f"{mine}:broken", sensitivity__images=16, sensitivity__steps=1)
    with pytest.raises(UsageError, match=failed):
        rp.evaluate(net, data, tier=f"{mine}:broken")
