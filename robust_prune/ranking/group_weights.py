"""Weights of a group's slices, and sums over the positions of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..structure.types import GroupSlice


def weight_of(model: nn.Module, part: GroupSlice) -> nn.Parameter | None:
    """Return the weight that `part` cuts, or None.

    The channels of `nn.MultiheadAttention` are its embedding: its weight is the joint input projection on side ``in``
    and the output projection on side ``out``.

    Returns:
        The parameter; None if the module has no weight with an entry for each channel (norms without affine weights,
        PReLU with one parameter, separate attention projections).
    """
    if part.side == "param":
        return model.get_parameter(part.target)
    module = model.get_submodule(part.target)
    if isinstance(module, nn.MultiheadAttention):
        module, name = (module, "in_proj_weight") if part.side == "in" else (module.out_proj, "weight")
        return module._parameters.get(name)
    weight = module._parameters.get("weight")
    if weight is None or (part.side == "norm" and len(weight) <= max(part.index)):
        return None
    return weight


def parameters_of(model: nn.Module, part: GroupSlice) -> tuple[nn.Parameter, ...]:
    """Return the weight that `part` cuts and, for sides ``out`` and ``norm``, the bias; empty without a weight."""
    weight = weight_of(model, part)
    if weight is None:
        return ()
    if part.side not in ("out", "norm"):
        return (weight,)
    module = model.get_submodule(part.target)
    bias = (module.out_proj if isinstance(module, nn.MultiheadAttention) else module)._parameters.get("bias")
    return (weight,) if bias is None else (weight, bias)


def per_channel(model: nn.Module, part: GroupSlice, values: Tensor, channels: int) -> Tensor:
    """Sum `values`, shaped like one of `parameters_of`, over the positions of each of the group's channels.

    Returns:
        float64 [channels] on the CPU.
    """
    sums = _per_position(model, part, values).double().cpu()
    index, root = torch.tensor(part.index), torch.tensor(part.root)
    return torch.zeros(channels, dtype=torch.float64).index_add(0, root, sums[index])


def _per_position(model: nn.Module, part: GroupSlice, values: Tensor) -> Tensor:
    """Sum over all dimensions except the one of the slice's side."""
    if values.ndim == 1:
        return values
    if part.side == "param":
        return values.movedim(part.dim, 0).flatten(1).sum(1)
    if part.side == "norm":
        return values.flatten(1).sum(1)
    module = model.get_submodule(part.target)
    if isinstance(module, _ConvNd):
        return _conv_positions(module, part.side == "in", values)
    return values.sum(0) if part.side == "in" else values.sum(1)


def _conv_positions(module: _ConvNd, inputs: bool, values: Tensor) -> Tensor:
    # A grouped convolution stores [out, in/groups, ...] (transposed: [in, out/groups, ...]): the second dimension
    # counts channels within one group, and the first one determines the group.
    blocks = values.reshape(module.groups, values.shape[0] // module.groups, values.shape[1], -1)
    long_side_is_input = isinstance(module, _ConvTransposeNd)
    return blocks.sum((2, 3) if inputs == long_side_is_input else (1, 3)).flatten()
