"""Layers and tensors that no step can work with are refused by name, with the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.branches import Plain
from torch import nn
from torch.nn.utils import prune

from robust_prune.errors import UsageError
from robust_prune.introspect.obstacles import check_layers, check_tensors

pytestmark = pytest.mark.filterwarnings("ignore")


def with_body(change: Callable[[nn.Module], object]) -> nn.Module:
    model = Plain()
    found = change(model.body[0])
    if isinstance(found, nn.Module):
        model.body[0] = found
    return model


def with_tensor(tensor: torch.Tensor) -> nn.Module:
    model = Plain()
    model.extra = nn.Parameter(tensor, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (torch.jit.script, "scripted or traced by torch.jit"),
        (lambda layer: torch.jit.trace(layer, torch.rand(1, 12, 8, 8)), "scripted or traced by torch.jit"),
        (torch.compile, "compiled by torch.compile"),
        (lambda layer: layer.compile(), "compiled by torch.compile"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove(layer"),
        (lambda layer: nn.utils.spectral_norm(layer), "torch.nn.utils.remove_spectral_norm(layer)"),
        (lambda layer: nn.utils.weight_norm(layer), "torch.nn.utils.remove_weight_norm(layer)"),
        (
            lambda layer: nn.utils.parametrizations.spectral_norm(layer),
            "remove_parametrizations(layer, 'weight')",
        ),
    ],
)
def test_layers_that_cannot_be_watched_or_cut(change: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_layers(with_body(change))
    assert "layer body.0 (" in str(refused.value) and said in str(refused.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Plain().half(), "stem.0.weight of Plain is float16, and all parameters must be float32"),
        (lambda: Plain().bfloat16(), "is bfloat16"),
        (lambda: Plain().double(), "Give model.float()"),
        (lambda: Plain().to("meta"), "is on the meta device"),
        (lambda: with_tensor(torch.eye(3).to_sparse()), "extra of Plain is stored as sparse_coo"),
        (lambda: with_tensor(torch.ones(3, dtype=torch.cfloat)), "extra of Plain is complex"),
        (torch.inference_mode()(Plain), "stem.0.weight of Plain was made under torch.inference_mode"),
        (lambda: with_body(lambda _: nn.LazyConv2d(16, 3)), "layer body.0 (LazyConv2d) is lazy"),
        (lambda: with_body(lambda _: torch.ao.nn.quantized.Conv2d(12, 16, 3)), "layer body.0 (Conv2d) is quantized"),
    ],
)
def test_tensors_that_are_no_real_numbers_in_memory(model: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_tensors(model())
    assert said in str(refused.value)


def test_plain_models_and_wrappers_of_parts_pass() -> None:
    check_layers(with_body(nn.DataParallel))
    check_tensors(Plain())
    check_tensors(with_body(lambda _: nn.LazyConv2d(16, 3)), lazy=True)
