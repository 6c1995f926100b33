"""Taylor scores: the first-order effect on a loss of removing a channel.

**What Taylor means here.** Removing channel c from a network is, whatever produced it, the same as setting the weights
that *read* it to zero: its coupled ``in`` slices. The first-order change of the loss is therefore -t_c with
``t_c = Σ w·∂R/∂w`` over all ``in`` slices of c, signs kept, since the slices go together. The slices that *write* c
describe the same removal a second time, so adding them would count it twice: behind conv, batch-norm and ReLU,
``Σ w·∂R/∂w`` over the batch-norm's weight and bias *equals* t_c, while the convolution's own sum leaves out what the
batch-norm's bias adds. So batch-norm is in t_c without being listed. Groups that no known layer reads fall back on
the norm slices, then on the ``out`` slices.

Attention is the exception, since no weight reads queries and keys: they meet in a product. Dimension d takes with it
the value's share, ``t_v``, which is what the projection's ``in`` slice says, and one term of the logits, which
query and key each tell whole: ``t_q = t_k``. The ``out`` slices sum to ``t_q + t_k + t_v``, so half of ``out`` and
half of ``in`` together are the effect ``t_q + t_v``.

**Why squares.** At a trained model the mean of t_c is close to zero, being a derivative at a minimum, and what is left
is noise. So t_c is taken over small batches b of fixed size and the score is ``sqrt(mean_b t_{c,b}²)``: the mean's
magnitude plus the spread, which is the empirical Fisher estimate of the second-order term (as in Molchanov et al.,
2019, arXiv 1906.10771). With a single batch it is plain |t_c|.
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
"""Most images a batch, so that scores do not depend on how much memory a machine has."""


def _face(model: nn.Module, group: ChannelGroup, attention: bool) -> list[tuple[GroupSlice, float]]:
    """Slices with factors such that their w·∂R/∂w tell the effect of removing a channel exactly once."""
    if attention:
        return [(s, 0.5) for s in group.slices if s.side in ("out", "in") and parameters_of(model, s)]
    for sides in (("in",), ("norm", "param"), ("out",)):
        face = [s for s in group.slices if s.side in sides and parameters_of(model, s)]
        if {channel for s in face for channel in s.root} >= set(range(group.channels)):
            return [(s, 1.0) for s in face]
    raise UsageError(f"group {group.name!r} has no convolution, linear or norm layer that Taylor scores could use")


def taylor_scores(asked: Scoring, given: Images) -> dict[str, Tensor]:
    """sqrt(mean_b t²) by group, float64 [channels], with the cross-entropy on `given` as the loss.

    Raises:
        UsageError: a group without a layer that tells the effect of its channels.
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
    """w·∂R/∂w elementwise for each weight; None for weights that the loss does not reach."""
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(weights, gradients, strict=True)
    return {id(w): None if g is None else w.detach() * g for w, g in pairs}
