"""Model files of this project: one file without pickle, from which the model is rebuilt bit for bit.

A ``.safetensors`` file contains the tensors and, in its metadata, a JSON manifest: format, version, specification of
the architecture, the changes that surgery made to it, threat model, provenance, and what the model computes on one
fixed image. A ``.pt`` file contains the same
for tools that use ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from ..attacks.threat import ThreatModel
from ..errors import UsageError
from ..models import fixed_image, registry, user_file, weight_files
from ..runs.files import atomic_write
from ..serialization import from_json, to_json
from ..shown import Shown
from .fixed_image import Fingerprint
from .manifest import apply_changes, describe_changes
from .normalization import NormalizedClassifier
from .spec import ModelSpec

FORMAT = "robust-prune"
VERSION = 1
KEY = "robust_prune"
"""Key of the manifest in the metadata of a safetensors file, or in the dict of a ``.pt`` file."""

SUFFIXES = (".safetensors", ".pt")
StoreDtype = Literal["float16"]


@dataclass(frozen=True, repr=False)
class Model(Shown):
    """A classifier with its specification; calling it maps images [N, C, H, W] in [0, 1] to logits [N, K].

    Attributes:
        module: the torch module, with normalization inside; an opened model is in eval mode and on the CPU.
        spec: specification of its dense architecture.
        threat: threat model of its training; None if it is unknown.
        provenance: JSON values on the origin of the model.
    """

    module: nn.Module
    spec: ModelSpec
    threat: ThreatModel | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in [0, 1]."""
        logits: Tensor = self.module(images)
        return logits

    def short(self) -> str:
        """Return architecture, number of classes, image size, number of parameters and threat model."""
        size = "x".join(map(str, self.spec.input_size))
        count = sum(parameter.numel() for parameter in self.module.parameters())
        against = f", trained against {self.threat}" if self.threat else ""
        return f"{self.spec.arch}, {self.spec.num_classes} classes, {size} images, {count:,} parameters{against}"


def save(
    path: str | Path,
    model: nn.Module,
    spec: ModelSpec,
    *,
    changes: Mapping[str, Any] | None = None,
    threat: ThreatModel | None = None,
    provenance: Mapping[str, Any] | None = None,
    store_dtype: StoreDtype | None = None,
) -> None:
    """Write `model` atomically, after checking that the contents of the file fit its rebuilt architecture.

    Args:
        path: a path that ends in ``.safetensors`` or ``.pt``.
        model: a `NormalizedClassifier` of `spec`'s architecture, dense or pruned.
        spec: specification of the dense architecture.
        changes: result of `describe_changes` for the dense `NormalizedClassifier` and `model`; computed by default.
        threat: threat model of the training.
        provenance: JSON values, such as recipe hash, parent hash and metrics.
        store_dtype: ``"float16"`` halves the size of the file by rounding matrices and kernels; vectors, such as
            batch-norm statistics, are not rounded. The loaded model has the rounded weights, so evaluate that model.

    Raises:
        UsageError: the suffix is another one, `model` does not fit `spec`, `threat` is no `ThreatModel`, or values
            cannot be stored in JSON or float16.
        EnvironmentProblem: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a model file ends in {' or '.join(SUFFIXES)}, got {path}")
    if not isinstance(model, NormalizedClassifier):
        raise UsageError(f"only a NormalizedClassifier can be saved, got {type(model).__name__}")
    if threat is not None and not isinstance(threat, ThreatModel):
        raise UsageError(f"the threat of a model is a ThreatModel or None, got {threat!r}.")
    spec = registry.without_pretrained(spec)
    fresh = registry.build(spec, pretrained=False, check=False)
    changes = dict(changes) if changes is not None else describe_changes(fresh, model)
    tensors = _stored(model.state_dict(), store_dtype)
    _fill(fresh, changes, _as_loaded(tensors, store_dtype), "the model to save")
    fingerprint = fixed_image.take(fresh, spec)
    manifest = _manifest(spec, changes, threat, provenance, store_dtype, fingerprint)
    if path.suffix == ".pt":
        atomic_write(path, lambda part: torch.save({KEY: manifest, "state_dict": tensors}, part))
    else:
        atomic_write(path, lambda part: safetensors.torch.save_file(tensors, part, metadata={KEY: manifest}))


def load(
    path: str | Path, *, arch: str | None = None, trust_source: bool = False, like: nn.Module | None = None
) -> Model:
    """Rebuild the model of an artifact, in eval mode on the CPU.

    Args:
        path: a file written by `save`.
        arch: current location of the architecture's ``file.py:function``. Such models require it, since loading runs
            the file, whose hash must be the recorded one. Leave it out for other architectures.
        trust_source: whether to run the ``file.py:function`` named in the artifact without `arch`; for files that the
            current run has written.
        like: for a model that was given as a Python object, the same object, built again.

    Raises:
        UsageError: the file is not an artifact, is damaged, was written by a newer version, its architecture cannot be
            rebuilt on this machine, or the rebuilt model computes something else than the saved one did.
    """
    path = Path(path)
    contents = weight_files.read(path)
    if not is_artifact(contents):
        raise UsageError(f"{path} is not a robust-prune artifact but plain weights. Open it with --arch.")
    return open_contents(path, contents, arch=arch, trust_source=trust_source, like=like)


def is_artifact(contents: weight_files.Contents) -> bool:
    """Return whether the contents of a file are an artifact."""
    return KEY in contents.metadata or (isinstance(contents.value, dict) and isinstance(contents.value.get(KEY), str))


def open_contents(
    path: Path,
    contents: weight_files.Contents,
    *,
    arch: str | None = None,
    trust_source: bool = False,
    like: nn.Module | None = None,
) -> Model:
    """Rebuild the model of an artifact that has been read already; see `load` for arguments and errors."""
    in_metadata = KEY in contents.metadata
    text = contents.metadata[KEY] if in_metadata else contents.value[KEY]
    tensors = contents.value if in_metadata else contents.value.get("state_dict")
    try:
        manifest = json.loads(text)
        spec = from_json(ModelSpec, manifest["spec"])
        changes = manifest["changes"]
        threat = from_json(ThreatModel, manifest["threat"]) if manifest["threat"] else None
        version, provenance, stored = manifest["version"], manifest["provenance"], manifest["store_dtype"]
        fingerprint = from_json(Fingerprint, manifest["fingerprint"]) if manifest.get("fingerprint") else None
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise UsageError(f"the manifest of {path} is damaged: {type(error).__name__}: {error}") from error
    if manifest.get("format") != FORMAT or not isinstance(version, int) or not isinstance(tensors, dict):
        raise UsageError(f"the manifest of {path} is damaged: it is not of format {FORMAT!r}")
    if version > VERSION:
        raise UsageError(f"{path} has format version {version}, this robust-prune reads up to {VERSION}. Upgrade it.")
    spec = _consented(path, spec, arch, trust_source)
    if like is not None and spec.arch.startswith(f"{registry.OBJECT}/"):
        registry.remember(like, spec.arch)
    model = registry.build(registry.without_pretrained(spec), pretrained=False, check=False)
    _fill(model, changes, _as_loaded(tensors, stored), str(path))
    if fingerprint is not None:
        fixed_image.check(fingerprint, model, spec, str(path))
    return Model(model.eval(), spec, threat, provenance)


def _consented(path: Path, spec: ModelSpec, arch: str | None, trust_source: bool) -> ModelSpec:
    # A manifest may name any Python file on the user's disk and arguments for any of its functions, so a file is run
    # only if the user names it or the caller trusts the artifact.
    if user_file.is_reference(spec.arch):
        if arch is None and not trust_source:
            raise UsageError(
                f"{path} was built by {spec.arch}, and loading it runs that file. "
                f"If you trust it, add --arch {spec.arch}"
            )
        return replace(spec, arch=arch) if arch is not None else spec
    if arch is not None and arch != spec.arch:
        raise UsageError(f"{path} holds a {spec.arch}, not {arch}. Leave --arch out: the file knows its architecture.")
    forbidden = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights"} & spec.kwargs.keys()
    if forbidden:
        raise UsageError(f"{path} asks its architecture to read other files ({', '.join(sorted(forbidden))}). Refused.")
    return spec


def _manifest(
    spec: ModelSpec,
    changes: Mapping[str, Any],
    threat: ThreatModel | None,
    provenance: Mapping[str, Any] | None,
    store_dtype: str | None,
    fingerprint: Fingerprint | None,
) -> str:
    value = {
        "format": FORMAT,
        "version": VERSION,
        "spec": to_json(spec),
        "changes": changes,
        "threat": to_json(threat) if threat else None,
        "provenance": dict(provenance or {}),
        "store_dtype": store_dtype,
        "fingerprint": to_json(fingerprint) if fingerprint else None,
    }
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"changes, kwargs and provenance must be plain JSON values: {error}") from error


def _stored(state: Mapping[str, Tensor], store_dtype: str | None) -> dict[str, Tensor]:
    if store_dtype not in (None, "float16"):
        raise UsageError(f"store_dtype must be float16 or nothing, got {store_dtype!r}")
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # Cloned, since safetensors does not store tensors that share memory, such as tied weights.
        value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if store_dtype == "float16" and value.ndim >= 2 and value.dtype == torch.float32:
            half = value.half()
            if not torch.equal(half.isfinite(), value.isfinite()):
                raise UsageError(f"{name} holds values beyond float16's range (65504). Store it in float32.")
            value = half
        stored[name] = value
    return stored


def _as_loaded(tensors: Mapping[str, Tensor], store_dtype: str | None) -> Mapping[str, Tensor]:
    """Return stored tensors in the precision in which the model computes."""
    if store_dtype != "float16":
        return tensors
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def _fill(model: nn.Module, changes: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """Load the shapes, data types and values of the stored tensors into a freshly built `model`."""
    apply_changes(model, dict(changes))
    targets = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        target = targets.get(name)
        if target is not None and target.dtype != tensor.dtype and target.is_floating_point():
            target.data = target.data.to(tensor.dtype)
    try:
        state = OrderedDict(tensors)
        state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # versions, which MNASNet needs
        model.load_state_dict(state, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        first = " ".join(str(error).split("\n\t")[1].split()) if "\n\t" in str(error) else str(error)
        raise UsageError(
            f"{what} does not fit its architecture: {first}. Was the model changed, or a package?"
        ) from error
