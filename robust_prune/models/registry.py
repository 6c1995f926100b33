"""Architectures by name: ``timm/…``, ``torchvision/…``, ``cifar/…`` or ``path/to/file.py:function``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import EnvironmentProblem, RobustPruneError, UsageError
from ..introspect.copies import copied
from ..introspect.fingerprint import models_hash
from ..introspect.modes import eval_mode, kept_modes
from ..introspect.obstacles import check_tensors
from ..models import cifar, robustbench, user_file
from ..printable import one_line
from ..suggest import did_you_mean
from .normalization import NormalizedClassifier
from .spec import ModelSpec
from .wrappers import unwrap

SOURCES = ("timm", "torchvision", "cifar", "robustbench")
OBJECT = "object"
"""Source of architectures that are Python objects of this process."""
_OBJECTS: dict[str, nn.Module] = {}
_FORMS = "timm/<name>, torchvision/<name>, cifar/<name>, robustbench/<data>/<threat>/<id> or path/to/file.py:function"
READS_FILES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments by which timm reads a file of weights, in ways that may run code from it."""
_AUX_HEADS = ("googlenet", "inception_v3")
# Exceptions of download libraries that do not derive from OSError.
_NETWORK_PACKAGES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib")


def make_spec(
    arch: str,
    *,
    num_classes: int,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    kwargs: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
) -> ModelSpec:
    """Return a checked `ModelSpec`; for ``file.py:function`` it records the hash of the file.

    Args:
        arch: name of the architecture, which is looked up but not built.
        num_classes: number of logits, at least 2.
        input_size: (channels, height, width) of an image.
        mean, std: mean and standard deviation of each channel of [0, 1] images; `std` is above 0.
        kwargs: further constructor arguments, JSON values only.
        class_names: name of each class; may be empty.

    Raises:
        UsageError: the architecture is malformed or unknown, or a value is out of range.
    """
    size = tuple(int(n) for n in input_size)
    if len(size) != 3:
        raise UsageError(f"input size must be (channels, height, width), got {tuple(input_size)}")
    try:
        plain = json.loads(json.dumps(dict(kwargs or {})))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model kwargs must be plain JSON values: {error}") from error
    spec = ModelSpec(
        arch=arch,
        num_classes=int(num_classes),
        input_size=(size[0], size[1], size[2]),
        mean=tuple(float(v) for v in mean),
        std=tuple(float(v) for v in std),
        kwargs=plain,
        class_names=tuple(class_names),
    )
    check_values(spec)
    return replace(spec, source_sha256=check_arch(arch))


def check_values(spec: ModelSpec) -> None:
    """Raise UsageError if a value of a specification is out of range."""
    if min(spec.input_size) < 1:
        raise UsageError(f"input size must be (channels, height, width), got {spec.input_size}")
    if spec.num_classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, got {spec.num_classes}")
    for label, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != spec.input_size[0]:
            raise UsageError(
                f"{label} must hold one number for each of {spec.input_size[0]} channels, got {len(values)}"
            )
    if not all(map(math.isfinite, (*spec.mean, *spec.std))) or min(spec.std) <= 0:
        raise UsageError(f"mean must be finite and std above 0, got {spec.mean} and {spec.std}")
    if spec.class_names and len(spec.class_names) != spec.num_classes:
        raise UsageError(f"{len(spec.class_names)} class names for {spec.num_classes} classes")


def remember(module: nn.Module, arch: str | None = None) -> str:
    """Register a torch module as an architecture until the process ends.

    Args:
        module: the module, which is copied; only its structure is used.
        arch: name under which an earlier process registered it; by default a name from class, structure and weights.

    Returns:
        ``object/<Class>-<hash>``.
    """
    name = arch.partition("/")[2] if arch else f"{type(module).__name__}-{models_hash(module)[:12]}"
    _OBJECTS[name] = copied(module).cpu()
    return f"{OBJECT}/{name}"


def check_arch(arch: str) -> str:
    """Look up `arch` without building it.

    Returns:
        The SHA-256 of the file for ``file.py:function``, else an empty string.

    Raises:
        UsageError: the form or the name is unknown, or the file does not exist.
    """
    if user_file.is_reference(arch):
        return user_file.sha256(arch)
    source, _, name = arch.partition("/")
    if source == OBJECT and name:
        if name not in _OBJECTS:
            raise UsageError(
                f"the model was a Python object ({name}) of another process. Build it again and give it, as in "
                "robust_prune.load(file, like=module)."
            )
        return ""
    if source not in SOURCES or not name:
        known = [f"cifar/{known}" for known in cifar.names()]
        raise UsageError(f"unknown architecture {arch!r}.{did_you_mean(f'cifar/{arch}', known)} Give {_FORMS}.")
    if source == "cifar":
        cifar.check_name(name)
        return ""
    if source == "robustbench":
        robustbench.parts(name)
        return ""
    known = _timm_names() if source == "timm" else _torchvision_names()
    if name not in known and not (source == "timm" and _is_timm_tag(name)):
        raise UsageError(f"unknown architecture {arch}.{did_you_mean(name, known, source + '/')}")
    return ""


def list_models(prefix: str = "") -> list[str]:
    """Return the names of known architectures that start with `prefix`, e.g. ``"timm/resnet"`` or ``"cifar/"``.

    timm and torchvision are imported only if the prefix may match their names.
    """
    found: list[str] = []
    for source, names in (("cifar", cifar.names), ("timm", _timm_names), ("torchvision", _torchvision_names)):
        if source.startswith(prefix.partition("/")[0]):
            found += [f"{source}/{name}" for name in names()]
    return sorted(name for name in found if name.startswith(prefix))


def build(spec: ModelSpec, *, pretrained: bool | None = None, check: bool = True) -> NormalizedClassifier:
    """Build the architecture of `spec` with fresh weights and its normalization, in train mode.

    Args:
        spec: specification; ``kwargs: {pretrained: true}`` downloads published weights.
        pretrained: overrides ``kwargs["pretrained"]``; with False no network is used.
        check: whether to run one black image through the model, to check its input size and number of logits.

    Raises:
        UsageError: the name is unknown, the constructor does not accept an argument, the architecture has no published
            weights, or the model does not return logits [N, num_classes].
        EnvironmentProblem: published weights cannot be downloaded.
    """
    kwargs = dict(spec.kwargs)
    check_kwargs(spec)
    wanted = bool(kwargs.pop("pretrained", False))
    wanted = wanted if pretrained is None else pretrained
    source, _, name = spec.arch.partition("/")
    if user_file.is_reference(spec.arch):
        backbone = _without_weights(spec, wanted, unwrap(user_file.call(spec, kwargs)))
        check_tensors(backbone, lazy=True)
    elif source == OBJECT:
        check_arch(spec.arch)
        backbone = _without_weights(spec, wanted, copied(_OBJECTS[name]))
    elif source == "cifar":
        channels = spec.input_size[0]
        kwargs.setdefault("in_chans", channels)
        backbone = _without_weights(spec, wanted, cifar.create(name, spec.num_classes, **kwargs))
    elif source == "robustbench":
        backbone = robustbench.load(name) if wanted else robustbench.create(name)
    elif source in ("timm", "torchvision"):
        check_arch(spec.arch)
        make = _timm_model if source == "timm" else _torchvision_model
        backbone = _guarded(spec, wanted, lambda: make(name, spec, kwargs, wanted))
    else:
        check_arch(spec.arch)
        raise UsageError(f"unknown architecture {spec.arch!r}. Give {_FORMS}.")
    model = NormalizedClassifier(backbone, spec.mean, spec.std)
    if check or user_file.is_reference(spec.arch):
        check_output(model, spec)
        check_tensors(model)
    return model.train()


def check_kwargs(spec: ModelSpec) -> None:
    """Refuse arguments by which timm reads other files, which may hold code.

    Raises:
        UsageError: the specification has such an argument.
    """
    forbidden = sorted(READS_FILES & spec.kwargs.keys())
    if forbidden and not user_file.is_reference(spec.arch):
        raise UsageError(
            f"{', '.join(forbidden)} would let {spec.arch} read other files. Leave it out, and give the weights as the "
            "model file."
        )


def check_output(model: nn.Module, spec: ModelSpec) -> None:
    """Run one black image through `model` in eval mode, and restore the modes of all modules.

    Raises:
        UsageError: the model fails on images of `spec.input_size`, or its output is not [1, num_classes].
    """
    reference = next((tensor for tensor in model.parameters()), torch.zeros(()))
    image = torch.zeros(1, *spec.input_size, device=reference.device, dtype=reference.dtype)
    size = "x".join(map(str, spec.input_size))
    try:
        with eval_mode(model), torch.no_grad():
            output = model(image)
    except RobustPruneError:
        raise
    except Exception as error:  # a model may raise any error on images of another size
        where = user_file.blame(error, spec.arch)
        raise UsageError(f"{spec.arch} cannot run on {size} images: {where}{one_line(error, 200)}") from error
    with kept_modes(model):
        model.train()  # some transformers cache a bias table in eval mode, which only train mode clears
    if not isinstance(output, torch.Tensor) or output.shape != (1, spec.num_classes):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UsageError(
            f"{spec.arch} must map [1, {size}] images to logits (1, {spec.num_classes}), but gave {shape}. "
            "Check the number of classes and that forward returns the logits alone."
        )


def without_pretrained(spec: ModelSpec) -> ModelSpec:
    """Return the spec without ``pretrained`` and torchvision's ``weights``, as artifacts store it."""
    return replace(spec, kwargs={k: v for k, v in spec.kwargs.items() if k not in ("pretrained", "weights")})


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _is_timm_tag(name: str) -> bool:
    import timm

    return "." in name and name in timm.list_pretrained(name.partition(".")[0] + ".*")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def timm_kwargs(name: str, spec: ModelSpec, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which timm builds an architecture for the images and classes of `spec`."""
    import timm

    channels, height, width = spec.input_size
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = config is not None and config.fixed_input_size and tuple(config.input_size[1:]) != (height, width)
    size = {"img_size": (height, width)} if fixed else {}
    return {"in_chans": channels, "num_classes": spec.num_classes, **size, **kwargs}


def _timm_model(name: str, spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=pretrained, **timm_kwargs(name, spec, kwargs))


def _torchvision_model(name: str, spec: ModelSpec, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    from torchvision import models

    if spec.input_size[0] != 3:
        raise UsageError(f"torchvision/{name} takes 3-channel images, the data have {spec.input_size[0]}. Use timm/…")
    weights = kwargs.pop("weights", "DEFAULT")
    if name not in _AUX_HEADS:
        return models.get_model(name, weights=weights if pretrained else None, num_classes=spec.num_classes, **kwargs)
    if pretrained:
        # Published weights of these two include the auxiliary heads; they are dropped after loading.
        model = models.get_model(name, weights=weights, num_classes=spec.num_classes, **kwargs)
        model.aux_logits = False
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, head):
                setattr(model, head, None)
        return model
    quiet = {"aux_logits": False, "init_weights": True} | kwargs
    return models.get_model(name, weights=None, num_classes=spec.num_classes, **quiet)


def _without_weights(spec: ModelSpec, pretrained: bool, model: nn.Module) -> nn.Module:
    if pretrained:
        raise UsageError(f"{spec.arch} has no published weights. Drop pretrained: true and give a checkpoint.")
    return model


def _guarded(spec: ModelSpec, pretrained: bool, make: Any) -> nn.Module:
    try:
        return make()
    except RobustPruneError:
        raise
    except Exception as error:  # constructors and download libraries raise errors of many kinds
        network = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
        if pretrained and network:
            raise EnvironmentProblem(
                f"cannot download the published weights of {spec.arch}: {one_line(error, 200)}. "
                "Connect to the internet once, or give a file and --arch."
            ) from error
        raise UsageError(
            f"cannot build {spec.arch} with {spec.kwargs or 'no arguments'}: {one_line(error, 200)}"
        ) from error
