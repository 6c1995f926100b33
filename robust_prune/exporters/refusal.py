"""Why torch's exporter refuses a model, in one line that names the place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

_FILE = re.compile(r'File "([^"]+)", line (\d+)')
_NODE = re.compile(r"translating node %(\w+) .*?target=(?:torch\.ops\.)?([\w.]+)", re.DOTALL)
_REMEDIES = (
    (
        "data-dependent",
        " The code there decides by the value of a tensor, which a file cannot; compute both branches and choose with "
        "torch.where.",
    ),
    (
        "Unsupported attribute type",
        " A setting of that operation, such as groups, depends on the number of images, which must be open in a file.",
    ),
)
_LIBRARY = ("site-packages/torch/", "site-packages/torchvision/")


def reason(model: nn.Module, example: Tensor, error: BaseException) -> str:
    """Return cause, place and remedy, as far as they are known.

    Args:
        model: the model that was refused.
        example: the images [N, C, H, W] with which its export was tried.
        error: what the exporter raised.
    """
    causes = list(_chain(error))
    text = "\n".join(map(str, causes))
    last = causes[-1]
    cause = (str(last).strip() or type(last).__name__).splitlines()[0]
    lines = [found for found in _FILE.findall(text) if not any(part in found[0] for part in _LIBRARY)]
    place = f" at {Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""
    if node := _NODE.search(text):
        place = f" at {_module_of(model, example, node[1])}, operation {node[2]}"
    remedy = next((said for sign, said in _REMEDIES if sign in text), "")
    return f"{cause.rstrip('.')}{place}.{remedy}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _module_of(model: nn.Module, example: Tensor, node: str) -> str:
    """Return the name and class of the innermost module of an operation; the model's class if it is not found."""
    with suppress(Exception):
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        stack = next(n for n in program.graph.nodes if n.name == node).meta["nn_module_stack"]
        name, kind = list(stack.values())[-1]
        short = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
        return f"{name} ({short})" if name else short
    return type(model).__name__
