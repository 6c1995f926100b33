"""Weights whose sensitivity is measured, and their temporary exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import UsageError

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Target:
    """One weight whose sensitivity is measured.

    Attributes:
        name: qualified name of the module; for the separate projections of `nn.MultiheadAttention` (used when key and
            value sizes differ) that of the parameter.
        kind: class name of the module.
        weight: the parameter.
        owners: every (module, attribute) that holds the parameter; more than one if weights are tied.
    """

    name: str
    kind: str
    weight: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """Return the weights of convolutions, linear layers and attention input projections, in registration order.

    The output projection of `nn.MultiheadAttention` is a linear layer of its own. A module that is registered twice
    appears once; two modules that share a parameter both appear, so that it can be found under either name.

    Raises:
        UsageError: the model has none of these layers, or a weight is computed by a parametrization.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    found: list[Target] = []
    for name, module in model.named_modules():
        for attribute in _weight_names(module):
            weight = module._parameters.get(attribute)
            if weight is None:
                if attribute == "weight":
                    raise UsageError(_computed(name, module))
                continue
            label = name if attribute in ("weight", "in_proj_weight") else f"{name}.{attribute}"
            found.append(Target(label, type(module).__name__, weight, tuple(owners[id(weight)])))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no convolution, linear or attention layer, so it has no module to measure"
        )
    return tuple(found)


def _computed(name: str, module: nn.Module) -> str:
    remedies = {
        "weight_mask": "masks of torch.nn.utils.prune: torch.nn.utils.prune.remove(module, 'weight')",
        "weight_g": "weight norm: torch.nn.utils.remove_weight_norm(module)",
        "weight_u": "spectral norm: torch.nn.utils.remove_spectral_norm(module)",
    }
    plain = "a parametrization: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    remedy = next((text for attribute, text in remedies.items() if hasattr(module, attribute)), plain)
    return (
        f"the weight of {name!r} is computed from others, so it cannot be perturbed or pruned. Fold it in first; it is "
        f"{remedy}."
    )


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("weight",)
    return ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ()


@contextmanager
def exchanged(target: Target, weight: Tensor) -> Iterator[nn.Parameter]:
    """Replace the target's parameter by `weight` inside the ``with`` block.

    The original parameter is never written to, so it is restored bit for bit.

    Args:
        target: the parameter to replace.
        weight: tensor of the same shape; the yielded parameter requires gradients if it does.

    Yields:
        The temporary parameter.
    """
    temporary = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    try:
        for module, attribute in target.owners:
            module._parameters[attribute] = temporary
        yield temporary
    finally:
        for module, attribute in target.owners:
            module._parameters[attribute] = target.weight
