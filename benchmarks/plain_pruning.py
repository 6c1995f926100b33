"""torch-pruning's own pruner, used as in its documentation; the baseline of `zoo.py`.

One call removes half of the channels of every layer but the classifier, by L2 magnitude over groups. The removed
channels are recorded as positions in the dense model, so that the result can be compared with the masked dense model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from robust_prune.structure.cutting import CHANNEL_LAYERS, Place
from robust_prune.structure.masking import masked
from robust_prune.structure.reference import first_line, relative_error

CHANNEL_RATIO = 0.5
_CONV_OR_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)


class Untold(Exception):
    """Raised for a cut that cannot be expressed as zeroed positions of known layers."""


def prune_plain(dense: nn.Module, classes: int, images: Tensor) -> tuple[nn.Module | None, dict[str, Any]]:
    """Prune a copy of `dense` and compare it with the masked `dense`.

    Args:
        dense: in eval mode, with every parameter requiring gradients.
        classes: number of logits; layers with this number of outputs are ignored, as in torch-pruning's examples.
        images: images [N, C, H, W] in the model's precision.

    Returns:
        The pruned model, or None if it does not run, and a dict of ``groups``, ``runs``, ``parity`` (relative error, or
        None with a reason) and ``reason``.
    """
    small = copy.deepcopy(dense)
    found: dict[str, Any] = {"groups": None, "runs": False, "parity": None, "reason": ""}
    try:
        ignored = [m for m in small.modules() if isinstance(m, _CONV_OR_LINEAR) and _outputs(m) == classes]
        pruner = tp.pruner.BasePruner(
            small, (images[:1],), importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=CHANNEL_RATIO, ignored_layers=ignored,
            in_channel_groups={}, out_channel_groups={}, num_heads={},
        )  # fmt: skip
        tracker, count = _Tracker(pruner.DG), 0
        for group in pruner.step(interactive=True):
            tracker.note(group)
            group.prune()
            count += 1
        found["groups"] = count
        with torch.no_grad():
            got = small(images)
        found["runs"] = bool(got.shape == (len(images), classes) and torch.isfinite(got).all())
        if not found["runs"]:
            found["reason"] = f"logits {list(got.shape)}, finite: {bool(torch.isfinite(got).all())}"
            return None, found
        gone = tracker.told()
        with torch.no_grad(), masked(dense, gone):
            found["parity"] = relative_error(got, dense(images))
    except Untold as error:
        found["reason"] = str(error)
    except Exception as error:  # any error of its tracing and pruning functions is a result
        found["reason"] = f"{type(error).__name__}: {first_line(error)}"
    return (small if found["runs"] else None), found


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


class _Tracker:
    """Records the channels that groups remove, as positions in the dense model."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._alive: dict[Place, list[int]] = {}
        self._gone: dict[Place, set[int]] = {}
        self._unknown = ""

    def note(self, group: Any) -> None:
        """Record a group; must be called before the group is pruned."""
        for dependency, positions in group:
            place = self._place(dependency)
            if place is None:
                continue
            alive = self._alive.setdefault(place, list(range(self._size(dependency, place))))
            drop = {p for p in positions if p < len(alive)}
            self._gone.setdefault(place, set()).update(alive[p] for p in drop)
            self._alive[place] = [c for p, c in enumerate(alive) if p not in drop]

    def told(self) -> dict[Place, set[int]]:
        """Return the removed positions by place.

        Raises:
            Untold: a layer was cut that cannot be masked.
        """
        if self._unknown:
            raise Untold(f"a cut {self._unknown} cannot be compared with a masked one")
        return self._gone

    def _place(self, dependency: Any) -> Place | None:
        node, module = dependency.target, dependency.target.module
        out = self._graph.is_out_channel_pruning_fn(dependency.handler)
        if isinstance(module, nn.Parameter):
            return self._graph._param_to_name[module], "param", node.pruning_dim % module.dim()
        if module not in self._graph._module2name:
            return None
        name = self._graph._module2name[module]
        if node.type == ops.OPTYPE.DEPTHWISE_CONV:
            return name, "out", 0
        if isinstance(module, _CONV_OR_LINEAR):
            return name, "out" if out else "in", 0
        if isinstance(module, CHANNEL_LAYERS):
            return name, "norm", 0
        if list(module.parameters()):
            self._unknown = type(module).__name__
        return None

    def _size(self, dependency: Any, place: Place) -> int:
        module = dependency.target.module
        if place[1] == "param":
            return int(module.shape[place[2]])
        graph, handler = self._graph, dependency.handler
        out = place[1] != "in" and graph.is_out_channel_pruning_fn(handler)
        return int(graph.get_out_channels(module) if out else graph.get_in_channels(module))
