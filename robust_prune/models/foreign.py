"""Opening whatever a user has: our artifacts, the embedded demo, and other projects' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from ..data.base import DataBundle
from ..errors import EnvironmentProblem, UsageError
from ..models import artifact, registry, weight_files
from .artifact import Model
from .manifest import apply_changes, describe_changes
from .normalization import NormalizedClassifier
from .spec import ModelSpec
from .state_dict import FoundWeights, find_weights, fit_to

DEMO = "demo"
"""Name of the embedded, adversarially trained model."""


def open_model(
    path_or_name: str | Path,
    *,
    arch: str | None = None,
    data: DataBundle | None = None,
    kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    trust_source: bool = False,
) -> Model:
    """Opens a model for any command.

    An artifact of ours knows all about itself; the data are only held against it. A state_dict needs `arch` and `data`.
    It may be nested (``state_dict``, ``model``, ``ema`` and the like), carry prefixes (``module.``,
    ``_orig_mod.``, ``backbone.``) and the buffers of a normalization layer, whose statistics then replace the data's.

    Args:
        path_or_name: a file, or ``"demo"`` for the embedded model.
        arch: architecture of a foreign checkpoint; for an artifact of a ``file.py:function``, where that file is now.
        data: what the model is to be used with; weights take their classes, image size and normalization from it.
        kwargs: constructor arguments for `arch`.
        trust_pickle: allow pickled modules, which run code from the file. `arch` is needed all the same, since the
            result must be rebuilt without pickle.
        trust_source: see `artifact.load`.

    Raises:
        UsageError: a wrong path, kind of file, architecture, or data that do not fit the model.
        EnvironmentProblem: the embedded model is missing from the installation.
    """
    path = demo_path() if str(path_or_name) == DEMO else Path(path_or_name).expanduser()
    if str(path_or_name) == DEMO and arch is not None:
        raise UsageError("the demo model knows its architecture. Leave --arch out.")
    if not path.exists() and str(path_or_name).partition("/")[0] in registry.SOURCES:
        raise UsageError(
            f"{path_or_name} is an architecture, not a model file. Give the file, and the architecture as "
            f"--arch {path_or_name}."
        )
    contents = weight_files.read(path, trust_pickle=trust_pickle)
    if artifact.is_artifact(contents):
        loaded = artifact.open_contents(path, contents, arch=arch, trust_source=trust_source)
        if data is not None:
            check_data(loaded.spec, num_classes=data.num_classes, input_size=data.input_size)
        return loaded
    found = find_weights(contents.value, str(path))
    if arch is None:
        kind = "a pickled module" if found.module is not None else "plain weights"
        raise UsageError(
            f"{path} holds {kind} and does not say which architecture they belong to. Add --arch, e.g. "
            "--arch cifar/resnet18, --arch timm/resnet50 or --arch my_model.py:make_model."
        )
    if data is None:
        raise UsageError(
            f"{path} holds plain weights: their classes, image size and normalization must be known. Give --data."
        )
    spec = registry.make_spec(
        arch,
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        kwargs=kwargs,
        class_names=data.class_names,
    )
    return _open_foreign(path, found, registry.without_pretrained(spec))


def check_data(spec: ModelSpec, *, num_classes: int | None = None, input_size: Sequence[int] | None = None) -> None:
    """Raises `UsageError` unless data of these classes and this image size fit the model (None: unknown)."""
    if input_size is not None and tuple(input_size) != tuple(spec.input_size):
        wanted, found = ("x".join(map(str, size)) for size in (spec.input_size, input_size))
        hint = " Greyscale and colour do not mix." if input_size[0] != spec.input_size[0] else ""
        raise UsageError(f"the model takes {wanted} images, the data have {found}.{hint} Choose matching --data.")
    if num_classes is not None and num_classes != spec.num_classes:
        raise UsageError(
            f"the model tells {spec.num_classes} classes apart, the data have {num_classes}. Choose matching --data."
        )


def demo_path() -> Path:
    """Where the embedded model lies.

    Raises:
        EnvironmentProblem: the installation lacks it.
    """
    path = Path(str(resources.files("robust_prune") / "data" / "sample" / "demo.safetensors"))
    if not path.is_file():
        raise EnvironmentProblem("the embedded demo model is missing from this installation. Reinstall robust-prune.")
    return path


def _open_foreign(path: Path, found: FoundWeights, spec: ModelSpec) -> Model:
    model = registry.build(spec, pretrained=False)
    fitted = fit_to(model.backbone.state_dict(), found, spec, str(path), pruned_allowed=found.module is not None)
    if fitted.mean and fitted.std:
        spec = replace(spec, mean=fitted.mean, std=fitted.std)
        model = NormalizedClassifier(model.backbone, spec.mean, spec.std)
    if found.module is not None:
        _follow_pruned_module(model.backbone, found.module, fitted.prefix)
    model.backbone.load_state_dict(fitted.tensors, strict=True)
    provenance: dict[str, Any] = {"opened_from": path.name, "weights_from": found.where or "top level"}
    if found.alternatives:
        provenance["weights_not_used"] = list(found.alternatives)
    if fitted.mean:
        provenance["normalization_from"] = "checkpoint"
    return Model(model.eval(), spec, None, provenance)


def _follow_pruned_module(backbone: nn.Module, module: nn.Module, prefix: str) -> None:
    """Gives `backbone` the shapes and attributes of a pickled module that another tool may have pruned."""
    inner = module.get_submodule(prefix.rstrip(".")) if prefix else module
    apply_changes(backbone, describe_changes(backbone, inner))
