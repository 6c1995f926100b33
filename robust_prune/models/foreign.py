"""Opening of models: our artifacts, the embedded demo, published models, and checkpoints of other projects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.base import DataBundle
from ..errors import EnvironmentProblem, UsageError
from ..introspect.copies import copied
from ..models import artifact, bounded, published, registry, weight_files
from .artifact import Model
from .manifest import apply_changes, describe_changes
from .normalization import AUTO, Normalization, NormalizedClassifier, no_normalization, parse
from .normalization_choice import Choice, choose, is_behind, normalizes_inside, score
from .spec import ModelSpec
from .state_dict import Fitted, FoundWeights, configured_statistics, find_weights, fit_all

DEMO = "demo"
"""Name of the embedded, adversarially trained model."""

_MOST_SETS = 4


def open_model(
    path_or_name: str | Path,
    *,
    arch: str | None = None,
    data: DataBundle | None = None,
    kwargs: Mapping[str, Any] | None = None,
    normalization: str = AUTO,
    trust_pickle: bool = False,
) -> Model:
    """Open a model, in eval mode on the CPU.

    An artifact describes itself; `data` are only checked against it. Published models are named as in
    `published.is_published`. A state_dict requires `arch` and `data`. It may be nested (under ``state_dict``,
    ``model``, ``ema`` and other keys), have prefixes (``module.``, ``_orig_mod.``, ``backbone.``), and contain tensors
    that belong to the training alone. ``provenance["notes"]`` says what was chosen, changed and left out.

    Args:
        path_or_name: a file, the name of a published model, or ``"demo"`` for the embedded model.
        arch: architecture of a foreign checkpoint, or the current location of an artifact's ``file.py:function``.
        data: data set of the model, from which weights take classes and image size.
        kwargs: constructor arguments of `arch`.
        normalization: normalization that weights were trained with, see `normalization.parse`. With ``auto`` it is
            that of the checkpoint; else none if the network normalizes inside, or that of the configuration of a timm
            or torchvision architecture, if this is as accurate on training images as any other; else the most accurate
            one (`normalization_choice.choose`).
        trust_pickle: whether to allow pickled modules, which run code from the file. `arch` is still required, since
            the model must be rebuilt without pickle.

    Raises:
        UsageError: the path, kind of file or architecture is wrong, the data do not fit the model, or the normalization
            is not known and cannot be measured.
        EnvironmentProblem: the embedded model is missing from the installation, or published weights are neither on
            this machine nor can be downloaded.
    """
    name = str(path_or_name)
    path = demo_path() if name == DEMO else Path(path_or_name).expanduser()
    if name == DEMO and arch is not None:
        raise UsageError("the demo model knows its architecture. Leave --arch out.")
    if not path.exists() and published.is_published(name):
        if arch is not None:
            raise UsageError(f"{name} names a published model, whose architecture is known. Leave --arch out.")
        return published.open_published(name, data, kwargs, normalization)
    if not path.exists() and name.partition("/")[0] == "cifar":
        raise UsageError(f"{name} is an architecture without weights. Give a file of weights, and --arch {name}.")
    contents = weight_files.read(path, trust_pickle=trust_pickle)
    if artifact.is_artifact(contents):
        loaded = artifact.open_contents(path, contents, arch=arch)
        if data is not None:
            check_data(loaded.spec, num_classes=data.num_classes, input_size=data.input_size)
            _check_normalization(path, loaded.spec, parse(normalization, data))
        return loaded
    found = find_weights(contents.value, str(path))
    if arch is None:
        kind = "a pickled module" if found[0].module is not None else "plain weights"
        raise UsageError(
            f"{path} holds {kind} and does not say which architecture they belong to. Add --arch, e.g. "
            "--arch cifar/resnet18, --arch timm/resnet50 or --arch my_model.py:make_model."
        )
    if data is None:
        raise UsageError(
            f"{path} holds plain weights: their classes, image size and normalization must be known. Give --data."
        )
    given = parse(normalization, data)
    spec = registry.make_spec(
        arch,
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        kwargs=kwargs,
        class_names=data.class_names,
    )
    stored = configured_statistics(contents.value, data.input_size[0])
    return _open_weights(path, found, registry.without_pretrained(spec), data, given, stored)


def check_data(spec: ModelSpec, *, num_classes: int | None = None, input_size: Sequence[int] | None = None) -> None:
    """Raise UsageError unless the number of classes and the image size fit the model; None is not checked."""
    if input_size is not None and tuple(input_size) != tuple(spec.input_size):
        wanted, found = ("x".join(map(str, size)) for size in (spec.input_size, input_size))
        hint = " Greyscale and colour do not mix." if input_size[0] != spec.input_size[0] else ""
        raise UsageError(f"the model takes {wanted} images, the data have {found}.{hint} Choose matching --data.")
    if num_classes is not None and num_classes != spec.num_classes:
        raise UsageError(
            f"the model tells {spec.num_classes} classes apart, the data have {num_classes}. Choose matching --data."
        )


def demo_path() -> Path:
    """Return the path of the embedded model.

    Raises:
        EnvironmentProblem: it is missing from the installation.
    """
    path = Path(str(resources.files("robust_prune") / "data" / "sample" / "demo.safetensors"))
    if not path.is_file():
        raise EnvironmentProblem("the embedded demo model is missing from this installation. Reinstall robust-prune.")
    return path


def _check_normalization(path: Path, spec: ModelSpec, given: Normalization | None) -> None:
    if given is not None and (given.mean, given.std) != (spec.mean, spec.std):
        own = Normalization("its own", spec.mean, spec.std)
        raise UsageError(f"{path} says how its images are normalized: {own}, not {given}. Leave --normalization out.")


@dataclass(frozen=True)
class _Candidate:
    """A set of weights that fits, its normalization, and which training images it classifies correctly, bool [N]."""

    weights: FoundWeights
    fitted: Fitted
    choice: Choice
    right: Tensor | None

    def __str__(self) -> str:
        share = "" if self.right is None else f" ({100 * self.right.float().mean().item():.1f} %)"
        return f"{self.weights.where or 'top level'}{share}"


def _open_weights(
    path: Path,
    found: Sequence[FoundWeights],
    spec: ModelSpec,
    data: DataBundle,
    given: Normalization | None,
    stored: tuple[tuple[float, ...], tuple[float, ...]],
) -> Model:
    bounded.check_buildable(spec)
    network = registry.build(spec, pretrained=False).backbone.eval()
    fitting = fit_all(network.state_dict(), found, spec, str(path), network)[:_MOST_SETS]
    candidates = []
    for weights, fitted in fitting:
        inner = network if len(fitting) == 1 else copied(network)
        _fill(inner, weights, fitted)
        choice = _normalization(inner, spec, data, given, fitted, stored)
        several = len(fitting) > 1 and len(data.train) > 0
        right = score(inner, data, [choice.normalization])[0][0].right if several else None
        candidates.append(_Candidate(weights, fitted, choice, right))
    taken = _best(candidates)
    if len(fitting) > 1:
        _fill(network, taken.weights, taken.fitted)
    choice = taken.choice
    spec = replace(spec, mean=choice.normalization.mean, std=choice.normalization.std)
    notes = [f"Normalization: {choice.normalization} ({choice.reason}).", *map(_sentence, taken.fitted.notes)]
    if len(candidates) > 1:
        others = ", ".join(str(candidate) for candidate in candidates if candidate is not taken)
        notes.append(f"{path.name} holds several sets of weights: {taken} was taken, {others} not.")
    where = taken.weights.where or "top level"
    provenance: dict[str, Any] = {"opened_from": path.name, "weights_from": where, "notes": notes}
    return Model(NormalizedClassifier(network, spec.mean, spec.std).eval(), spec, None, provenance)


def _best(candidates: Sequence[_Candidate]) -> _Candidate:
    """Return the first one, which conventions prefer, unless another is more accurate beyond noise."""
    taken = candidates[0]
    for other in candidates[1:]:
        if taken.right is not None and other.right is not None and is_behind(taken.right, other.right):
            taken = other
    return taken


def _fill(network: nn.Module, weights: FoundWeights, fitted: Fitted) -> None:
    if weights.module is not None:
        _follow_pruned_module(network, weights.module, fitted.prefix)
    network.load_state_dict(fitted.tensors, strict=True)


def _normalization(
    network: nn.Module,
    spec: ModelSpec,
    data: DataBundle,
    given: Normalization | None,
    fitted: Fitted,
    stored: tuple[tuple[float, ...], tuple[float, ...]],
) -> Choice:
    """Return the normalization and the reason for it, from what is known best to what must be measured."""
    channels = spec.input_size[0]
    if given is not None:
        return Choice(given, "as asked for")
    if fitted.mean:
        return choose(network, data, Normalization("stored", fitted.mean, fitted.std), "a layer of the checkpoint")
    if stored[0] and not normalizes_inside(network, channels):
        return choose(network, data, Normalization("stored", *stored), "the settings in the checkpoint")
    if normalizes_inside(network, channels):
        return choose(network, data, no_normalization(channels), "the network has a mean and a deviation itself")
    configured = published.configured(spec)
    if configured is not None:
        return choose(network, data, configured, f"the configuration of {spec.arch}")
    return choose(network, data)


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _follow_pruned_module(network: nn.Module, module: nn.Module, prefix: str) -> None:
    """Apply to `network` the shapes and attributes of a pickled module, which another tool may have pruned."""
    inner = module.get_submodule(prefix.rstrip(".")) if prefix else module
    apply_changes(network, describe_changes(network, inner))
