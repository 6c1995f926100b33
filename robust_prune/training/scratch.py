"""The small network from scratch: what a pruned one has to beat."""

from __future__ import annotations

import torch
from torch import nn

from ..models import registry
from ..models.manifest import apply_changes, describe_changes
from ..models.spec import ModelSpec


def fresh_like(spec: ModelSpec, pruned: nn.Module, seed: int) -> nn.Module:
    """The architecture of `pruned` with the weights that `spec`'s constructor draws, in train mode on the CPU.

    Constructors draw the weights of a layer independently of each other, so that the first channels of a fresh dense
    layer are a fresh smaller layer. Their spread is that of the dense layer.

    Args:
        spec: names the dense architecture.
        pruned: a model of it after surgery; it stays as it is.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = registry.build(spec, pretrained=False)
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    apply_changes(model, describe_changes(model, pruned))
    shaped = pruned.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            # Whole numbers that were cut, such as tables of positions, are part of the structure.
            structure = tensor.shape != dense[name].shape and not tensor.is_floating_point()
            tensor.copy_(shaped[name] if structure else dense[name][tuple(slice(size) for size in tensor.shape)])
    return model.train()
