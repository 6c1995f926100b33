"""What hangs together in a model: coupled channels, and what a channel is in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["out", "in", "norm", "param"]


@dataclass(frozen=True)
class GroupSlice:
    """What one module (or free parameter) loses when channels of a group go.

    Attributes:
        target: qualified name of the module, or of the parameter for side ``param``.
        side: ``out`` (output channels of conv/linear), ``in`` (input channels), ``norm`` (per-channel
            affine layers: batch/layer/group norm, PReLU), ``param`` (a free nn.Parameter, dimension `dim`).
        index: positions along that side.
        root: for each position, the group channel (0..channels-1) it belongs to.
        dim: the parameter's dimension for side ``param``, else 0.
    """

    target: str
    side: Side
    index: tuple[int, ...]
    root: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True)
class ChannelGroup:
    """Layers coupled through the graph: channel c goes from all of them or from none.

    Attributes:
        name: qualified name of the root module, whose output channels are the group's channels.
        channels: number of channels.
        blocks: channels must be removed in the same number from each of `blocks` equal consecutive parts
            (grouped convolution: number of groups; attention heads with equal head dimensions: heads; else 1).
        slices: everything that is cut together; the first is the root's ``out`` side.
        traced: whether it was found by perturbing values, where the graph had it wrong.
        members: names of the groups that it bundles, because the model's code wants equal widths of them; else empty.
        dense: channels before any cut, of which floors are a share; None if there was no cut before.
    """

    name: str
    channels: int
    slices: tuple[GroupSlice, ...]
    blocks: int = 1
    traced: bool = False
    members: tuple[str, ...] = ()
    dense: int | None = None

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the conv/linear modules whose output channels this group cuts, without repeats."""
        return tuple(dict.fromkeys(s.target for s in self.slices if s.side == "out"))


@dataclass(frozen=True)
class Skipped:
    """A group that stays whole, and why."""

    name: str
    reason: str
