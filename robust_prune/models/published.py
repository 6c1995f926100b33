"""Models with published weights, by name; `open_published` lists the forms."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..data.base import DataBundle
from ..errors import EnvironmentProblem, RobustPruneError, UsageError
from ..printable import one_line
from . import registry, robustbench
from .artifact import Model
from .normalization import AUTO, Normalization, NormalizedClassifier, no_normalization, parse
from .spec import ModelSpec

T = TypeVar("T")
_HUBS = ("hf-hub:", "hf_hub:")
_TIMM, _TORCHVISION, _ROBUSTBENCH = "timm", "torchvision", "robustbench"
_PATIENCE_SECONDS = 5
_MISSING = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")


def is_published(name: str) -> bool:
    """Return whether `name` has the form of a published model's name; the name itself may be unknown."""
    return name.startswith(_HUBS) or name.partition("/")[0] in (_TIMM, _TORCHVISION, _ROBUSTBENCH)


def open_published(
    name: str, data: DataBundle | None, kwargs: Mapping[str, Any] | None = None, normalization: str = AUTO
) -> Model:
    """Return a model with its published weights and the normalization of their configuration, in eval mode on the CPU.

    Weights that are on this machine are used without asking the network.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME`` or ``torchvision/NAME.WEIGHTS`` (such as
            ``torchvision/resnet50.IMAGENET1K_V1``), ``hf-hub:ORG/NAME`` (a timm model on the Hugging Face Hub), or
            ``robustbench/DATA/THREAT/ID``.
        data: data set, which must have the classes of the weights; without it the model's own image size is taken.
        kwargs: further arguments of the constructor.
        normalization: replaces that of the configuration; see `normalization.parse`.

    Raises:
        UsageError: the name is unknown, or the data have another number of classes or channels.
        EnvironmentProblem: the weights are not on this machine and cannot be downloaded, or a package is missing.
    """
    if name.startswith(_HUBS):
        found = _from_hub(name, dict(kwargs or {}), data)
    elif name.startswith(_ROBUSTBENCH):
        found = _from_robustbench(name, data)
    else:
        found = _from_library(name, dict(kwargs or {}), data)
    given = parse(normalization, data) if data is not None else None
    if given is not None:
        spec = replace(found.spec, mean=given.mean, std=given.std)
        assert isinstance(found.module, NormalizedClassifier)
        module = NormalizedClassifier(found.module.backbone, spec.mean, spec.std).eval()
        found = replace(found, module=module, spec=spec)
    why = "as asked for" if given is not None else "the configuration of these weights"
    used = given or Normalization("configured", found.spec.mean, found.spec.std)
    if not any(used.mean) and set(used.std) == {1.0}:
        used = no_normalization(len(used.mean))
    notes = [f"Normalization: {used} ({why})."]
    return replace(found, provenance={"opened_from": name, "notes": notes})


def configured(spec: ModelSpec) -> Normalization | None:
    """Return the normalization in the configuration of a timm or torchvision architecture, if it has one."""
    source, _, name = spec.arch.partition("/")
    channels = spec.input_size[0]
    if source == _TIMM:
        pair = _timm_statistics(name)
    elif source == _TORCHVISION:
        pair = _statistics(_torchvision_weights(name, None))
    else:
        return None
    if pair is None or len(pair[0]) != channels:
        return None
    return Normalization(f"{source}'s", tuple(map(float, pair[0])), tuple(map(float, pair[1])))


def _from_library(name: str, kwargs: dict[str, Any], data: DataBundle | None) -> Model:
    source, _, rest = name.partition("/")
    arch, weights = name, None
    if source == _TORCHVISION and "." in rest:
        rest, _, weights = rest.partition(".")
        arch = f"{source}/{rest}"
    registry.check_arch(arch)
    if source == _TIMM:
        import timm

        config = timm.get_pretrained_cfg(rest, allow_unregistered=True)
        if config is None or not config.has_weights:
            raise UsageError(f"{name} has no published weights in timm. Give a file, with --arch {arch}.")
        classes, size, pair = config.num_classes, config.input_size, _timm_statistics(rest)
    else:
        entry = _torchvision_weights(rest, weights)
        if entry is None:
            raise UsageError(f"{name} has no published weights in torchvision. Give a file, with --arch {arch}.")
        side = entry.transforms().crop_size[0]
        classes, size, pair = len(entry.meta["categories"]), (3, side, side), _statistics(entry)
        kwargs["weights"] = entry.name
    spec = _spec(name, arch, classes, size, pair, kwargs, data)
    model = _cached_first(name, lambda: registry.build(spec, pretrained=True))
    return Model(model.eval(), registry.without_pretrained(spec))


def _from_hub(name: str, kwargs: dict[str, Any], data: DataBundle | None) -> Model:
    import timm
    from timm.models import load_model_config_from_hf

    identifier = name.partition(":")[2]
    hub = f"hf-hub:{identifier}"
    config, arch, arguments = _cached_first(name, lambda: load_model_config_from_hf(identifier))
    registry.check_arch(f"{_TIMM}/{arch}")
    kwargs = {**(arguments or {}), **kwargs}
    own = config.get("mean"), config.get("std")
    pair: Any = own if all(own) else (_timm_statistics(arch) or ((0.0,) * 3, (1.0,) * 3))
    size = tuple(config.get("input_size") or (3, 224, 224))
    spec = _spec(name, f"{_TIMM}/{arch}", int(config["num_classes"]), size, pair, kwargs, data)
    build = registry.timm_kwargs(arch, spec, kwargs)
    network: nn.Module = _cached_first(name, lambda: timm.create_model(hub, pretrained=True, **build))
    model = NormalizedClassifier(network, spec.mean, spec.std)
    registry.check_output(model, spec)
    return Model(model.eval(), spec)


def _from_robustbench(name: str, data: DataBundle | None) -> Model:
    identifier = name.partition("/")[2]
    dataset, _, _ = robustbench.parts(identifier)
    size = (3, 224, 224) if dataset == "imagenet" else (3, 32, 32)
    pair: Any = (0.0,) * 3, (1.0,) * 3  # RobustBench's networks take [0, 1] images
    spec = _spec(name, name, robustbench.CLASSES[dataset], size, pair, {}, data)
    model = NormalizedClassifier(robustbench.load(identifier), spec.mean, spec.std)
    registry.check_output(model, spec)
    return Model(model.eval(), spec, robustbench.threat_of(identifier))


def _spec(
    name: str,
    arch: str,
    classes: int,
    size: tuple[int, ...],
    pair: Any,
    kwargs: dict[str, Any],
    data: DataBundle | None,
) -> ModelSpec:
    if data is not None and data.num_classes != classes:
        raise UsageError(
            f"the weights of {name} tell {classes:,} classes apart, {data.name} has {data.num_classes:,}. Choose "
            f"matching --data, or train it first: robust-prune train --arch {arch} "
            "--set 'model.kwargs={pretrained: true}'."
        )
    if data is not None and data.input_size[0] != len(pair[0]):
        raise UsageError(
            f"the weights of {name} are for {len(pair[0])} channels, {data.name} has images of {data.input_size[0]}."
        )
    return registry.make_spec(
        arch,
        num_classes=classes,
        input_size=data.input_size if data is not None else size,
        mean=pair[0],
        std=pair[1],
        kwargs=kwargs,
        class_names=data.class_names if data is not None else (),
    )


def _timm_statistics(name: str) -> tuple[Any, Any] | None:
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (config.mean, config.std) if config is not None else None


def _torchvision_weights(name: str, weights: str | None) -> Any:
    from torchvision import models

    try:
        known = models.get_model_weights(name)
    except ValueError:
        return None
    if weights is None:
        return known.DEFAULT if len(known) else None
    if weights not in known.__members__:
        raise UsageError(f"torchvision/{name} has no weights {weights}; it has {', '.join(known.__members__)}.")
    return known[weights]


def _statistics(weights: Any) -> tuple[Any, Any] | None:
    preset = weights.transforms() if weights is not None else None
    mean, std = getattr(preset, "mean", None), getattr(preset, "std", None)
    return (mean, std) if mean and std else None


def _cached_first(name: str, make: Callable[[], T]) -> T:
    """Call `make` without network, and again with it if a file is not on this machine.

    Raises:
        EnvironmentProblem: a file is missing and the network cannot be reached, or the download fails.
    """
    try:
        with _offline():
            return make()
    except Exception as error:  # timm and the hub raise errors of many kinds
        if not any(type(cause).__name__ in _MISSING for cause in _chain(error)):
            raise _reported(name, error) from error
    _check_network(name)
    try:
        return make()
    except Exception as error:  # as above
        raise _reported(name, error) from error


def _reported(name: str, error: Exception) -> RobustPruneError:
    if isinstance(error, RobustPruneError):
        return error
    reason = one_line(error, 160)
    return EnvironmentProblem(f"cannot load {name}: {reason}. Check the name, or give a file and --arch.")


def _check_network(name: str) -> None:
    # The hub's client repeats failed requests for most of a minute before it gives up.
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_PATIENCE_SECONDS):
            pass
    except urllib.error.HTTPError:
        return
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return
        raise EnvironmentProblem(
            f"the weights of {name} are not on this machine, and {constants.ENDPOINT} cannot be reached "
            f"({getattr(error, 'reason', error)}). Connect to the internet once, or give a file and --arch."
        ) from error


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
