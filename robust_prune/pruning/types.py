"""Values that pass between finding groups, planning and surgery."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        traced: whether it was found by watching values, where the graph had it wrong.
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
class Refused:
    """A group that stays whole, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PlannedGroup:
    """Which channels of a group go; `traced` and `members` as in ChannelGroup."""

    name: str
    channels: int
    removed: tuple[int, ...]
    mrs: float
    traced: bool = False
    members: tuple[str, ...] = ()

    @property
    def keep(self) -> int:
        """Channels that stay."""
        return self.channels - len(self.removed)


@dataclass(frozen=True)
class PruningPlan:
    """The whole cut, before anything is touched.

    Attributes:
        ratio: share of `of` to remove, in (0, 1).
        of: ``macs``, ``params``, ``channels`` or ``latency``.
        macs_before .. params_after: for one image, closed form over channel counts.
        note: empty when the budget was met within 1 %, else which budget is nearest and why.
    """

    ratio: float
    of: str
    allocation: str
    criterion: str
    align: int
    groups: tuple[PlannedGroup, ...]
    refused: tuple[Refused, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PruningPlan:
        """The plan that `to_json` wrote."""
        data = dict(value)
        data["groups"] = tuple(
            PlannedGroup(**{**g, "removed": tuple(g["removed"]), "members": tuple(g.get("members", ()))})
            for g in data["groups"]
        )
        data["refused"] = tuple(Refused(**r) for r in data["refused"])
        return cls(**data)
