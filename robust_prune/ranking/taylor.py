"""Taylor scores: the first-order effect on a loss of removing a channel.

**Definition.** Removing channel c has the same effect as setting the weights that *read* it to zero: its coupled ``in``
slices. The first-order change of the loss is therefore -t_c with ``t_c = Σ w·∂R/∂w`` over all ``in`` slices of c. Signs
are kept, since the slices are removed together. The slices that *write* c describe the same removal, so adding them
would count it twice: behind a convolution, batch-norm and ReLU, ``Σ w·∂R/∂w`` over weight and bias of the batch-norm
*equals* t_c, while the sum over the convolution lacks the contribution of the batch-norm's bias. Batch-norm is thus
included in t_c without being listed. Groups that no known layer reads use the norm slices or, without those, the
``out`` slices.

Attention is an exception, since no weight reads queries and keys; they are multiplied with each other. Removing
dimension d removes the value's contribution ``t_v``, which the ``in`` slice of the projection gives, and one term of
the attention logits, which query and key each give in full: ``t_q = t_k``. The ``out`` slices sum to ``t_q + t_k +
t_v``, so half of ``out`` and half of ``in`` together are the effect ``t_q + t_v``.

**Squares.** The mean of t_c is a derivative near a minimum, so it is close to zero at a trained model, and noise
dominates. Therefore t_c is computed on small batches b of fixed size, and the score is ``sqrt(mean_b t_{c,b}²)``. It
combines the magnitude of the mean with the variance, the empirical Fisher estimate of the second-order term (as in
Molchanov et al., 2019, arXiv 1906.10771). With a single batch the score is |t_c|.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..structure.attention import find_attention
from ..structure.types import ChannelGroup, GroupSlice
from .group_weights import parameters_of, per_channel
from .scoring import Images, Scoring

TAYLOR_BATCH = 32
"""Largest number of images in a batch; fixed, so that scores do not depend on the memory of the machine."""


def _face(model: nn.Module, group: ChannelGroup, attention: bool) -> list[tuple[GroupSlice, float]]:
    """Return slices and factors such that the weighted w·∂R/∂w count the removal of each channel exactly once."""
    if attention:
        return [(s, 0.5) for s in group.slices if s.side in ("out", "in") and parameters_of(model, s)]
    for sides in (("in",), ("norm", "param"), ("out",)):
        face = [s for s in group.slices if s.side in sides and parameters_of(model, s)]
        if {channel for s in face for channel in s.root} >= set(range(group.channels)):
            return [(s, 1.0) for s in face]
    raise UsageError(f"group {group.name!r} has no convolution, linear or norm layer that Taylor scores could use")


def taylor_scores(asked: Scoring, given: Images) -> dict[str, Tensor]:
    """Return sqrt(mean_b t²) by group name, float64 [channels], for the cross-entropy on the images `given`.

    Raises:
        UsageError: a group has no convolution, linear or norm layer that Taylor scores can use.
    """
    model, groups, device, (images, labels) = asked.model, asked.groups, asked.device, given
    batch_size = min(asked.batch_size, TAYLOR_BATCH)
    squares = {group.name: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    dtype = weights_dtype(model)
    with frozen_eval(model), track("Channel importance, Taylor", len(labels)) as advance:
        roots = {block.producers[0] for block in find_attention(model, images[:1].to(device, dtype))}
        faces = {group.name: _face(model, group, group.name in roots) for group in groups}
        weights = list({id(w): w for face in faces.values() for s, _ in face for w in parameters_of(model, s)}.values())
        for weight in weights:
            weight.requires_grad_(True)
        for start in range(0, len(labels), batch_size):
            x, y = images[start : start + batch_size].to(device, dtype), labels[start : start + batch_size].to(device)
            products = _products(model, x, y, weights)
            for group in groups:
                change = torch.zeros(group.channels, dtype=torch.float64)
                for part, factor in faces[group.name]:
                    for weight in parameters_of(model, part):
                        if (product := products[id(weight)]) is not None:
                            change += factor * per_channel(model, part, product, group.channels)
                squares[group.name] += change.square() * len(y)
            advance(len(y))
    return {name: (total / len(labels)).sqrt() for name, total in squares.items()}


def _products(model: nn.Module, x: Tensor, y: Tensor, weights: list[nn.Parameter]) -> dict[int, Tensor | None]:
    """Return w·∂R/∂w elementwise for each weight, by `id`; None for weights on which the loss does not depend."""
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(weights, gradients, strict=True)
    return {id(w): None if g is None else w.detach() * g for w, g in pairs}
