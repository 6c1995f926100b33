"""A small network with fresh weights, trained from scratch as the baseline of a pruned one."""

from __future__ import annotations

import torch
from torch import nn

from ..models import registry
from ..models.manifest import apply_changes, describe_changes
from ..models.spec import ModelSpec


def fresh_like(spec: ModelSpec, pruned: nn.Module, seed: int) -> nn.Module:
    """Return a model with the architecture of `pruned` and freshly initialised weights, in train mode on the CPU.

    The weights of a layer are initialised independently of each other, so the first channels of a fresh dense layer
    form a fresh smaller layer. Their standard deviation is that of the dense layer.

    Args:
        spec: specification of the dense architecture.
        pruned: a pruned model of this architecture; it is not changed.
        seed: random seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = registry.build(spec, pretrained=False)
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    apply_changes(model, describe_changes(model, pruned))
    shaped = pruned.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in dense:  # the constant in place of a branch, which begins at zero
                continue
            # Cut integer buffers, such as position indices, are part of the structure.
            structure = tensor.shape != dense[name].shape and not tensor.is_floating_point()
            tensor.copy_(shaped[name] if structure else dense[name][tuple(slice(size) for size in tensor.shape)])
    return model.train()
