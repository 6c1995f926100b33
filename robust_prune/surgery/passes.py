"""Passes of a model over a fixed set of images that end at a layer, and go on at the next one.

The layers are visited in the order in which they run. What a pass has computed before its layer is recorded (see
`sensitivity.replay`), so that the pass to the next layer computes only what lies between the two, and all passes
together compute little more than one. Between two passes the weights of the visited layer may change; those of layers
before it may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sensitivity.replay import Recording, extend, replay, trace_calls

MOST_RECORDED = 1 << 30
"""Bytes of all recordings together; batches beyond them are computed from the images on in each pass."""


class Reached(Exception):
    """Raised by a hook when the last layer of a pass has run, to skip the rest of the forward pass."""


@dataclass(frozen=True)
class Batches:
    """Batches of images [B, C, H, W], and how models run on them: device, data type, bf16 autocast or not."""

    parts: Sequence[Tensor]
    device: torch.device
    dtype: torch.dtype
    bf16: bool

    def ready(self, x: Tensor) -> Tensor:
        """Return images as the models take them."""
        return x.to(self.device, self.dtype)

    def run(self, model: nn.Module, forward: Callable[[Tensor], object], x: Tensor, hooks: Mapping[str, Any]) -> None:
        """Run a pass with forward hooks on layers of the model by name, of which one may raise `Reached`."""
        handles = [
            model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()
        ]
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                forward(self.ready(x))
        except Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()


class Continued:
    """Passes of a model to one layer after the other.

    Memory: at most `MOST_RECORDED` bytes of recorded outputs, which are those that the rest of the pass depends on.

    Args:
        model: the model, in eval mode and without gradients.
        layers: names of layers that run once in a pass, in the order in which they run.
        batches: the images.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], batches: Batches) -> None:
        self._model, self._batches = model, batches
        self._few = batches.ready(batches.parts[0][:1])
        self._trace = trace_calls(model, self._few, [self._weight(name) for name in layers])
        self._recordings = [Recording() for _ in batches.parts]

    def to(self, name: str) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yield the input and the output of a layer for each batch, None where it does not run."""
        keep = self._trace.frontier(self._weight(name))
        unused = self._unused(keep)
        held = 0
        for number, (x, recording) in enumerate(zip(self._batches.parts, self._recordings, strict=True)):
            found = self._passed(name, x, recording, keep)
            if found is not None and recording.replaced and bool(found[0].isnan().any()):
                recording = Recording()
                found = self._passed(name, x, recording, keep)
            recording = recording.without(unused)
            held += recording.nbytes()
            self._recordings[number] = recording if held <= MOST_RECORDED else Recording()
            yield found

    def _passed(self, name: str, x: Tensor, recording: Recording, keep: frozenset[int]) -> tuple[Tensor, Tensor] | None:
        found: list[Tensor] = []

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found.extend((args[0] if args else kwargs["input"], output))
            raise Reached

        def forward(images: Tensor) -> None:
            extend(self._model, self._trace, images, recording, keep)

        self._batches.run(self._model, forward, x, {name: hook})
        return (found[0].to(self._batches.dtype), found[1].to(self._batches.dtype)) if found else None

    def _unused(self, keep: frozenset[int]) -> frozenset[int]:
        """Return those of the calls `keep` on whose outputs the rest of the pass does not depend.

        On an image the logits stay the same, bit for bit, when all of these outputs are NaN.
        """
        whole = Recording()
        logits = extend(self._model, self._trace, self._few, whole, keep)

        def same(calls: frozenset[int]) -> bool:
            some = replace(whole, outputs=dict(whole.outputs)).without(calls)
            return torch.equal(replay(self._model, self._trace, self._few, some, keep), logits)

        found = frozenset(call for call in keep if same(frozenset({call})))
        return found if same(found) else frozenset()

    def _weight(self, name: str) -> nn.Parameter:
        weight = self._model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        return weight
