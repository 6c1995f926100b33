"""Fresh weights in the pruned shape."""

from __future__ import annotations

import pytest
import torch
from builders.plans import halved, spec_of

from robust_prune.models import registry
from robust_prune.training.scratch import fresh_like


@pytest.mark.parametrize("arch", ["cifar/resnet20", "cifar/mobilevit_xs"])
def test_a_fresh_model_has_the_pruned_shape_and_weights_of_its_own(arch: str) -> None:
    spec = spec_of(arch)
    torch.manual_seed(5)
    pruned = halved(registry.build(spec).eval()).model
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
