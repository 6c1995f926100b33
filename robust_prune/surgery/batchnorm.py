"""Re-estimation of batch-norm statistics after a cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.base import ImageSet, as_floats
from ..errors import UsageError
from ..introspect.modes import eval_mode
from ..models.layout import weights_dtype


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module,
    images: ImageSet,
    *,
    count: int = 2048,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> int:
    """Replace the running statistics of every batch-norm by their average over batches of training images.

    Removing channels shifts the mean and variance of the remaining activations, so the old statistics no longer fit.
    All layers are re-estimated in the same passes, each with the batch statistics of the layers before it.

    Args:
        model: on `device`; modes, momenta and `requires_grad` flags are restored.
        images: training images; never test images.
        count: largest number of images, drawn at random, so that the order of classes does not matter.
        batch_size: images in each batch. The last batch is dropped if it has less than half of them, since all batches
            have equal weight.
        device: device on which to compute.
        seed: random seed of the choice of images.

    Returns:
        Number of batch-norm layers that were re-estimated; 0 if the model has none.

    Raises:
        UsageError: there are fewer than two images in a batch. After any error the old statistics are restored.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    if min(len(images), count, batch_size) < 2:
        raise UsageError(
            f"batch-norm statistics need at least 2 images a batch, got {len(images)} images, count {count}, "
            f"batch_size {batch_size}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    with _estimating(model, layers):
        for part in _batches(order, batch_size):
            x, _ = images.get(part)
            model(as_floats(x, device).to(weights_dtype(model)))
    return len(layers)


def _batches(items: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        if start == 0 or len(batch) >= max(2, size / 2):
            yield batch


@contextmanager
def _estimating(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Put only the batch-norms in train mode, with reset statistics and equal weight for all batches."""
    momenta = [layer.momentum for layer in layers]
    kept = [{name: b.clone() for name, b in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        with eval_mode(model):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            yield
    except BaseException:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, buffer in buffers.items():
                getattr(layer, name).copy_(buffer)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
