"""Groups of coupled channels, and the positions that each channel occupies in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["out", "in", "norm", "param"]


@dataclass(frozen=True)
class GroupSlice:
    """Positions of one module or free parameter that belong to the channels of a group.

    Attributes:
        target: qualified name of the module, or of the parameter for side ``param``.
        side: ``out`` (output channels of a convolution or linear layer), ``in`` (their input channels), ``norm``
            (channels of batch, layer, group or instance norm, or PReLU) or ``param`` (dimension `dim` of an
            nn.Parameter that belongs to none of these layers).
        index: positions along that side.
        root: for each position in `index`, the channel of the group (0..channels-1) to which it belongs.
        dim: dimension of the parameter for side ``param``, else 0.
    """

    target: str
    side: Side
    index: tuple[int, ...]
    root: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that share channels: a channel is removed from all of them or from none.

    Attributes:
        name: qualified name of the root module, whose output channels are the group's channels.
        channels: number of channels.
        blocks: number of equal consecutive parts of the channels from each of which the same number must be removed
            (groups of a grouped convolution, heads of an attention block, else 1).
        slices: all positions that are cut together; the first slice is the root's ``out`` side.
        traced: whether the group was found by perturbing values (`tracing`) rather than in the dependency graph.
        members: names of the groups bundled in this one because the model's code ties their widths; else empty.
        dense: channels before the first cut, of which minimum widths are a share; None if nothing has been cut.
        least: smallest share of the dense channels to keep, in [0, 1], whatever holds for other groups.
    """

    name: str
    channels: int
    slices: tuple[GroupSlice, ...]
    blocks: int = 1
    traced: bool = False
    members: tuple[str, ...] = ()
    dense: int | None = None
    least: float = 0.0

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the convolutions and linear layers whose output channels this group cuts, without repeats."""
        return tuple(dict.fromkeys(s.target for s in self.slices if s.side == "out"))


@dataclass(frozen=True)
class Skipped:
    """Name of a group or layer that is not pruned, and the reason."""

    name: str
    reason: str
