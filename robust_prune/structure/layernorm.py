"""Replacement of torch-pruning's LayerNorm pruning function, which does not preserve the order of channels.

torch-pruning 1.6.1 calls ``Tensor.sort()`` as if it worked in place. Kept weights stay in hash order, so once more than
about half of a wide norm is removed, weights are assigned to wrong channels. The replacement is registered for each
graph; torch-pruning's global state is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch_pruning.pruner.function import LayernormPruner


class OrderedLayerNormPruner(LayernormPruner):
    """Removes channels of an `nn.LayerNorm` over one dimension and preserves the order of the others."""

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
