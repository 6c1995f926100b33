"""Changes made by surgery, as plain JSON from which a fresh dense model becomes the pruned one without pickle.

A pruned model differs from its dense architecture in the shapes of tensors and in plain attributes of modules
(`out_channels`, `num_heads`, `nChannels`, ...), and may lack residual branches. All are recorded here; the weights are
an ordinary state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .branches import Branch, take_out, taken_out, traced_attributes

_SCALARS = (bool, int, float, str, type(None))
# Modes and hooks describe the use of a model, not its architecture.
_BOOKKEEPING = frozenset(vars(nn.Module()))


def describe_changes(base: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Return the changes of shapes and attributes that turn `base` into `pruned`.

    Args:
        base: the dense architecture as built by its constructor; weights do not matter.
        pruned: the same architecture after surgery.

    Returns:
        ``{"attributes": {module name: {attribute: value}}, "shapes": {state_dict key: [sizes]}}``, JSON values only,
        with entries only for differences, and ``"branches"``, a list of the fields of `Branch` in the order in which
        they were taken out, if there are any. The name of the model itself is ``""``.

    Raises:
        UsageError: the two are not the same architecture, or a non-persistent buffer, which a state_dict does not
            contain, changed its shape.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    before, after = _tensors(base), _tensors(pruned)
    known = taken_out(base)
    branches = {name: branch for name, branch in taken_out(pruned).items() if name not in known}
    blocks = tuple(f"{branch.block}." for branch in branches.values())
    after = {name: tensor for name, tensor in after.items() if name not in branches}
    odd = [*(after.keys() - before.keys()), *(n for n in before.keys() - after.keys() if not n.startswith(blocks))]
    if odd:
        raise UsageError(
            f"cannot describe the pruned model: tensor {min(odd)!r} exists in only one of the two models. Pass the "
            "dense model that the pruned one came from."
        )
    attributes: dict[str, dict[str, Any]] = {}
    present = {name: vars(module) for name, module in pruned.named_modules(remove_duplicate=False)}
    for name, values in (present | traced_attributes(pruned)).items():
        old: Mapping[str, Any] = vars(modules[name]) if name in modules else {}
        changed = {k: _to_json(v) for k, v in values.items() if _differs(k, v, old)}
        if changed:
            attributes[name] = changed
    shapes = {k: list(t.shape) for k, t in after.items() if t.shape != before[k].shape}
    lost = sorted(shapes.keys() - pruned.state_dict().keys())
    if lost:
        raise UsageError(
            f"cannot describe the pruned model: buffer {lost[0]!r} changed shape but is not saved in the "
            "state_dict. Register it with persistent=True."
        )
    changes = {"attributes": attributes, "shapes": shapes}
    return changes | ({"branches": [_to_json(b) for b in branches.values()]} if branches else {})


def apply_changes(fresh_model: nn.Module, changes: dict[str, Any]) -> None:
    """Apply the attributes and tensor shapes of `changes` to `fresh_model` and take branches out, in place.

    Changed tensors are left uninitialised; load the pruned state_dict (``strict=True``) afterwards. Tied parameters and
    `requires_grad` flags are kept.

    Args:
        fresh_model: the dense architecture, freshly built.
        changes: result of `describe_changes`, possibly read from JSON. It may come from an untrusted file: only
            existing plain attributes are set, no tensor can grow, and the constant of a branch is no longer than
            the longest side of a parameter.

    Raises:
        UsageError: the model does not have a module, attribute, tensor or branch, or a value or shape is invalid. The
            model is then not changed, unless a branch is missing.
    """
    modules = dict(fresh_model.named_modules(remove_duplicate=False))
    tensors = _tensors(fresh_model)
    attributes, shapes = changes.get("attributes"), changes.get("shapes")
    if not isinstance(attributes, dict) or not isinstance(shapes, dict):
        raise UsageError(
            "the manifest of changes must hold the objects 'attributes' and 'shapes'. The file is damaged or not ours."
        )
    for name, values in attributes.items():
        _check_attributes(name, values, modules)
    for key, shape in shapes.items():
        _check_shape(key, shape, tensors)
    branches = [_checked_branch(value, tensors) for value in _as_list(changes.get("branches", []))]

    for name, values in attributes.items():
        for attribute, value in values.items():
            current = vars(modules[name])[attribute]
            setattr(modules[name], attribute, type(current)(value) if isinstance(current, (tuple, list)) else value)
    made: dict[int, torch.Tensor] = {}
    for key, shape in shapes.items():
        owner_name, _, tensor_name = key.rpartition(".")
        owner, old = modules[owner_name], tensors[key]
        if id(old) not in made:
            empty = torch.empty(shape, dtype=old.dtype, device=old.device)
            made[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        new = made[id(old)]
        if isinstance(new, nn.Parameter):
            owner._parameters[tensor_name] = new
        else:
            owner._buffers[tensor_name] = new
    for branch in branches:  # last, since tracing reads the attributes
        take_out(fresh_model, branch)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _plain(value: Any) -> bool:
    """Return whether JSON can represent a value, with tuples as lists."""
    return isinstance(value, _SCALARS) or (isinstance(value, (tuple, list)) and all(_plain(v) for v in value))


def _to_json(value: Any) -> Any:
    if isinstance(value, Branch):
        return {**vars(value), "readers": list(value.readers)}
    return [_to_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def _differs(name: str, value: Any, old: Mapping[str, Any]) -> bool:
    return name not in _BOOKKEEPING and name in old and _plain(value) and _plain(old[name]) and value != old[name]


def _check_attributes(name: str, values: Any, modules: dict[str, nn.Module]) -> None:
    if name not in modules:
        raise UsageError(
            f"the manifest changes module {name!r}, which the architecture does not have. Check the "
            "architecture and the versions of the packages that build it."
        )
    if not isinstance(values, dict):
        raise UsageError(
            f"the manifest's attributes of module {name!r} must be an object, got {type(values).__name__}."
        )
    known = vars(modules[name])
    for attribute, value in values.items():
        if attribute in _BOOKKEEPING or attribute not in known or not _plain(known[attribute]):
            raise UsageError(
                f"the manifest sets {name}.{attribute}, which is not a plain attribute of "
                f"{type(modules[name]).__name__}. Check the architecture and package versions."
            )
        sequence = isinstance(known[attribute], (tuple, list))
        if not _plain(value) or sequence != isinstance(value, (tuple, list)):
            raise UsageError(
                f"the manifest sets {name}.{attribute} to {value!r}, but it was {known[attribute]!r}. The "
                "file is damaged or not ours."
            )


def _check_shape(key: str, shape: Any, tensors: dict[str, torch.Tensor]) -> None:
    if key not in tensors:
        raise UsageError(
            f"the manifest shapes tensor {key!r}, which the architecture does not have. Check the "
            "architecture and the versions of the packages that build it."
        )
    old = list(tensors[key].shape)
    whole = isinstance(shape, (list, tuple)) and all(type(n) is int for n in shape)
    if not whole or len(shape) != len(old) or any(not 1 <= n <= m for n, m in zip(shape, old, strict=True)):
        raise UsageError(
            f"the manifest gives {key!r} the shape {shape!r}, which is not a cut of {old}. The file is "
            "damaged or not ours."
        )


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError("the manifest's branches must be a list. The file is damaged or not ours.")
    return value


def _checked_branch(value: Any, tensors: Mapping[str, torch.Tensor]) -> Branch:
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    match value:
        case {"block": str(block), "readers": [str(), *_] as readers, "channels": c, "dims": dims, "dim": dim}:
            whole = all(type(number) is int for number in (c, dims, dim)) and 0 < dim < dims <= 5 and 1 <= c <= most
            if block and whole and all(isinstance(name, str) for name in readers):
                return Branch(block, tuple(readers), c, dims, dim)
    raise UsageError(f"the manifest takes out the branch {value!r}, which is none. The file is damaged or not ours.")
