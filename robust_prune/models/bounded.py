"""Limits on the memory and the time that the architecture named in a file may take.

A file of a few hundred bytes can name an architecture of gigabytes. Architectures are therefore built without memory
first (on torch's device ``meta``) and compared with what the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import UsageError
from . import registry, user_file
from .spec import ModelSpec

FREE_WEIGHTS = 2**27
"""Number of weights that any file may ask for: half a gigabyte in single precision."""
DENSE_SHARE = 16
"""Largest ratio of the weights of an architecture to those stored, as for a model of which 94 % were removed."""
FREE_TENSORS, TENSORS_SHARE = 2000, 8
"""The same for the number of parameters, which architectures may register several times."""
LONGEST_SIDE, MOST_CLASSES, MOST_VALUES = 4096, 1_000_000, 2**23
"""Largest number of channels, of pixels of a side, of classes, and of values of an image."""
MOST_TENSORS, COPIES = 20_000, 4
"""Largest number of parameters of an architecture that is trained, and copies: gradients, momentum, average."""
LARGEST_ARGUMENT = 100_000
"""Largest number among the arguments of an architecture, which builds lists of that length before any layer."""


def check_size(spec: ModelSpec, tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse a file whose architecture is far larger than its tensors; architectures of the user's code are not built.

    Args:
        spec: specification of the dense architecture.
        tensors: tensors of the file.
        what: name of the file.

    Raises:
        UsageError: the architecture is out of proportion, or cannot be built.
    """
    sizes = spec.input_size
    if max(sizes) > LONGEST_SIDE or math.prod(sizes) > MOST_VALUES or spec.num_classes > MOST_CLASSES:
        size = "x".join(map(str, spec.input_size))
        raise UsageError(f"{what} asks for {spec.num_classes:,} classes and {size} images. It is damaged.")
    if user_file.is_reference(spec.arch) or spec.arch.startswith(f"{registry.OBJECT}/"):
        return
    if (largest := max((abs(n) for n in _numbers(spec.kwargs)), default=0)) > LARGEST_ARGUMENT:
        raise UsageError(f"{what} asks for {spec.arch} with the number {largest:,.0f}. It is damaged.")
    stored = sum(tensor.numel() for tensor in tensors.values())
    with _few_parameters(max(FREE_TENSORS, TENSORS_SHARE * len(tensors)), spec.arch, what), torch.device("meta"):
        model = registry.build(registry.without_pretrained(spec), pretrained=False, check=False)
    wanted = sum(math.prod(tensor.shape) for tensor in model.state_dict().values())
    if wanted > max(FREE_WEIGHTS, DENSE_SHARE * stored):
        raise UsageError(
            f"{what} asks for {spec.arch} with {wanted:,} weights and holds {stored:,}. It is damaged, or made to fill "
            "the memory."
        )


def check_buildable(spec: ModelSpec) -> None:
    """Refuse an architecture that this machine cannot hold; architectures of the user's code are not built.

    Raises:
        UsageError: the architecture has more than `MOST_TENSORS` parameters, or its weights, their gradients, momentum
            and average need more than the free memory.
    """
    if user_file.is_reference(spec.arch) or spec.arch.startswith((f"{registry.OBJECT}/", "robustbench/")):
        return
    with _few_parameters(MOST_TENSORS, spec.arch, "the recipe"), torch.device("meta"):
        model = registry.build(registry.without_pretrained(spec), pretrained=False, check=False)
    wanted = COPIES * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if wanted > (free := psutil.virtual_memory().available):
        raise UsageError(
            f"{spec.arch} needs {wanted / 1e9:.1f} GB for its weights and their training, and {free / 1e9:.1f} GB of "
            "memory are free. Choose a smaller architecture."
        )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _numbers(part)


@contextmanager
def _few_parameters(most: int, arch: str, what: str) -> Iterator[None]:
    count = 0

    def registered(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UsageError(
                f"{what} asks for {arch} with more than {most:,} parameters, out of proportion to what it holds. It is "
                "damaged, or made to take time."
            )

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
