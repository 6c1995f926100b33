"""Facts, a user's file and weights that the tests of models share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.models import artifact, integrity, registry
from robust_prune.models.spec import ModelSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FACTS: dict[str, Any] = {"num_classes": 7, "input_size": (3, 32, 32), "mean": MEAN, "std": STD}
"""What an architecture must know of the images."""
SMALL = "cifar/resnet20_x0.25"

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def make_model(num_classes, width=8):
    return Net(num_classes, width)

def fixed():
    return Net(7)

def broken(num_classes):
    missing = {}
    return missing["key"]

def tuple_out(num_classes):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), 1
    return Pair(num_classes)

def not_a_module():
    return 3
"""


def data_of(facts: dict[str, Any] = FACTS) -> DataBundle:
    """A data set of these facts, without images."""
    shape = (0, *facts["input_size"])
    nothing = TensorImages(torch.zeros(shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    names = tuple(str(k) for k in range(facts["num_classes"]))
    return DataBundle(
        "facts", nothing, nothing, nothing, names, tuple(facts["mean"]), tuple(facts["std"]), tuple(facts["input_size"])
    )


def make_spec(arch: str, **changes: Any) -> ModelSpec:
    return registry.make_spec(arch, **(FACTS | changes))


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], *, seal: bool = True) -> Path:
    """Change the manifest and the tensors of a safetensors artifact; with `seal` its hashes are made anew."""
    with safetensors.safe_open(path, framework="pt") as stream:
        manifest = json.loads(stream.metadata()[artifact.KEY])
    tensors = safetensors.torch.load_file(path)
    edit(manifest, tensors)
    if seal:
        manifest.pop(integrity.MANIFEST, None)
        manifest = integrity.sealed(manifest, tensors)
    safetensors.torch.save_file(tensors, path, metadata={artifact.KEY: json.dumps(manifest)})
    return path
