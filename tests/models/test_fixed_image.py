"""A stored model is known again by its logits on a fixed image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_files import data_of, make_spec, rewrite
from builders.weights import randomised
from torch import nn

from robust_prune.errors import UsageError
from robust_prune.models import artifact, fixed_image, registry
from robust_prune.models.python_module import as_model
from robust_prune.models.spec import ModelSpec


class Small(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], num_classes: int = 7) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ModelSpec]:
    spec = make_spec("cifar/resnet20_x0.25")
    model = registry.build(spec)
    randomised(model)
    artifact.save(tmp_path / "m.safetensors", model, spec)
    return tmp_path / "m.safetensors", spec


def fingerprint(path: Path) -> dict[str, Any] | None:
    found: list[Any] = []
    rewrite(path, lambda manifest, _: found.append(manifest["fingerprint"]))
    return found[0]


def test_the_image_is_noise_that_is_the_same_everywhere() -> None:
    image = fixed_image.fixed_image((3, 8, 8))
    assert image.shape == (1, 3, 8, 8) and image.min() >= 0 and image.max() <= 1 and image.std() > 0.2
    assert (image[0, 0, 0, :4] * 255).round().int().tolist() == [158, 212, 219, 112]


def test_an_artifact_keeps_its_logits_as_they_are_when_it_is_opened(saved: tuple[Path, ModelSpec]) -> None:
    path, spec = saved
    model = artifact.load(path).module
    with torch.no_grad():
        logits = model(fixed_image.fixed_image(spec.input_size))[0]
    kept = fingerprint(path)
    assert kept is not None and torch.allclose(torch.tensor(kept["logits"]), logits, rtol=1e-4)
    assert list(kept["packages"]) == ["torch"]


def test_rounded_weights_keep_the_logits_of_the_rounded_model(saved: tuple[Path, ModelSpec]) -> None:
    path, spec = saved
    model = artifact.load(path).module
    artifact.save(path.with_name("half.safetensors"), model, spec, store_dtype="float16")
    full, half = fingerprint(path), fingerprint(path.with_name("half.safetensors"))
    assert full is not None and half is not None and full["logits"] != half["logits"]
    artifact.load(path.with_name("half.safetensors"))


@pytest.mark.parametrize(("share", "opens"), [(1e-4, True), (1e-2, False)])
def test_small_differences_of_other_machines_are_admitted(
    saved: tuple[Path, ModelSpec], share: float, opens: bool
) -> None:
    def edit(manifest: dict[str, Any], _: Any) -> None:
        logits = manifest["fingerprint"]["logits"]
        logits[2] += share * (max(logits) - min(logits))

    rewrite(saved[0], edit)
    if opens:
        artifact.load(saved[0])
        return
    with pytest.raises(UsageError, match=r"computes something else than when it was saved: .* by (1|0\.9\d*) %"):
        artifact.load(saved[0])


def test_changed_weights_and_packages_are_told_apart(saved: tuple[Path, ModelSpec]) -> None:
    def damage(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.linear.bias"][3] += 9

    rewrite(saved[0], damage)
    with pytest.raises(UsageError, match=r"m\.safetensors computes something else .*Restore the file from a copy"):
        artifact.load(saved[0])
    rewrite(saved[0], lambda manifest, _: manifest["fingerprint"]["packages"].update(torch="2.9.0"))
    with pytest.raises(UsageError, match=r"Restore the packages that it was saved with: torch 2\.9\.0 \(now 2"):
        artifact.load(saved[0])


def test_an_artifact_without_logits_opens_as_before_and_bad_ones_are_named(saved: tuple[Path, ModelSpec]) -> None:
    rewrite(saved[0], lambda manifest, _: manifest.pop("fingerprint"))
    artifact.load(saved[0])
    for bad in (
        {"logits": ["x"], "packages": {}},
        [1.0],
        {"logits": [1.0]},
        {"logits": [float("nan")], "packages": {}},
    ):
        rewrite(saved[0], lambda manifest, _, bad=bad: manifest.update(fingerprint=bad))
        with pytest.raises(UsageError, match=r"manifest of .* is damaged"):
            artifact.load(saved[0])
    rewrite(saved[0], lambda manifest, _: manifest.update(fingerprint={"logits": [1.0], "packages": {}}))
    with pytest.raises(UsageError, match="computes something else"):
        artifact.load(saved[0])


def test_a_users_code_that_reads_another_file_now_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "from pathlib import Path\nfrom torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)) * float((Path(__file__).parent / 'scale.txt').read_text())\n"
        "def make(num_classes):\n    return Net(3072, num_classes)\n"
    )
    (tmp_path / "scale.txt").write_text("2")
    spec = make_spec(f"{path}:make")
    artifact.save(tmp_path / "m.pt", registry.build(spec), spec)
    artifact.load(tmp_path / "m.pt", known=spec)
    (tmp_path / "scale.txt").write_text("3")
    with pytest.raises(UsageError, match=r"computes something else .*Restore .*model\.py:make, and what it reads"):
        artifact.load(tmp_path / "m.pt", known=spec)
    (tmp_path / "scale.txt").write_text("three")
    with pytest.raises(UsageError, match=r"model\.py:5: ValueError"):
        artifact.load(tmp_path / "m.pt", known=spec)


def test_a_python_object_that_is_another_function_is_refused(tmp_path: Path) -> None:
    model = as_model(Small(torch.relu), data_of())
    artifact.save(tmp_path / "m.pt", model.module, model.spec)
    artifact.load(tmp_path / "m.pt", like=Small(torch.relu))
    with pytest.raises(UsageError, match="Restore the Python module to what it was then, and give that"):
        artifact.load(tmp_path / "m.pt", like=Small(torch.sigmoid))


@pytest.mark.parametrize(
    "act",
    [lambda x: x + torch.randn_like(x), lambda x: x * torch.nan, lambda x: torch.autograd.grad(x.sum(), x)[0]],
    ids=["random", "nan", "needs gradients"],
)
def test_what_cannot_be_known_again_is_stored_without(
    tmp_path: Path, act: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = as_model(Small(torch.relu), data_of())
    spec = model.spec
    registry._OBJECTS[spec.arch.partition("/")[2]].act = act
    assert fixed_image.take(registry.build(spec, check=False), spec) is None
    artifact.save(tmp_path / "m.safetensors", registry.build(spec, check=False), spec)
    assert fingerprint(tmp_path / "m.safetensors") is None
    artifact.load(tmp_path / "m.safetensors")


def test_taking_logits_leaves_modes_and_random_numbers_alone() -> None:
    spec = make_spec("cifar/resnet20_x0.25")
    model = registry.build(spec)
    state = torch.random.get_rng_state()
    assert fixed_image.take(model, spec) is not None
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
