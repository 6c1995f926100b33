"""torch-pruning's LayerNorm function, replaced: its own leaves kept weights in hash order, not in channel order.

It calls ``Tensor.sort()`` as if that worked in place, so weights land on wrong channels once more than about half of a
wide norm goes (torch-pruning 1.6.1). Ours is registered per graph; torch-pruning's global state is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch_pruning.pruner.function import LayernormPruner


class OrderedLayerNormPruner(LayernormPruner):
    """Removes channels of an `nn.LayerNorm` over one dimension and keeps the rest in their order."""

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        """Remove the channels `idxs` (0..channels-1) from `layer`, in place.

        Raises:
            ValueError: the norm covers more than one dimension.
        """
        if len(layer.normalized_shape) != 1:
            raise ValueError(f"LayerNorm over {tuple(layer.normalized_shape)} covers more than the channels")
        removed_set = set(idxs)
        keep = [i for i in range(layer.normalized_shape[0]) if i not in removed_set]
        if layer.weight is not None:
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.normalized_shape = (len(keep),)
        return layer

    prune_in_channels = prune_out_channels
