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
from ..introspect.copies import copied
from ..models import fixed_image, registry, user_file, weight_files
from ..printable import check_plain, one_line
from ..runs.files import atomic_write
from ..serialization import from_json, to_json
from ..shown import Shown
from . import bounded, integrity
from .branches import taken_out
from .fixed_image import Fingerprint
from .manifest import apply_changes, describe_changes
from .normalization import NormalizedClassifier
from .spec import ModelSpec

FORMAT = "robust-prune"
VERSION = 2
"""Files of version 1 have no hashes."""
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


@dataclass(frozen=True)
class _Manifest:
    """What a file says of its model, beside format, version and hashes; see `save`."""

    spec: ModelSpec
    changes: dict[str, Any]
    threat: ThreatModel | None
    provenance: dict[str, Any]
    store_dtype: StoreDtype | None
    fingerprint: Fingerprint | None = None


_FIELDS = tuple(_Manifest.__dataclass_fields__)


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
    if taken_out(model) and store_dtype is None and (own := fixed_image.take(copied(model).cpu(), spec)):
        # The blocks are traced again when the file is opened, and their code may have read what no file holds.
        fixed_image.check(own, fresh, spec, "what a file would hold of this model")
    found = _Manifest(spec, changes, threat, dict(provenance or {}), store_dtype, fingerprint)
    manifest = _written(found, tensors)
    if path.suffix == ".pt":
        atomic_write(path, lambda part: torch.save({KEY: manifest, "state_dict": tensors}, part))
    else:
        atomic_write(path, lambda part: safetensors.torch.save_file(tensors, part, metadata={KEY: manifest}))


def load(
    path: str | Path, *, arch: str | None = None, known: ModelSpec | None = None, like: nn.Module | None = None
) -> Model:
    """Rebuild the model of an artifact, in eval mode on the CPU.

    Args:
        path: a file written by `save`.
        arch: current location of the architecture's ``file.py:function``. Such models require it, since loading runs
            the file, whose hash must be the recorded one. Leave it out for other architectures.
        known: specification that the file must carry, for files that the current run has written; a
            ``file.py:function`` in it runs without `arch`.
        like: for a model that was given as a Python object, the same object, built again.

    Raises:
        UsageError: the file is not an artifact, is damaged, was written by a newer version, its architecture cannot be
            rebuilt on this machine, or the rebuilt model computes something else than the saved one did.
    """
    path = Path(path)
    contents = weight_files.read(path)
    if not is_artifact(contents):
        raise UsageError(f"{path} is not a robust-prune artifact but plain weights. Open it with --arch.")
    return open_contents(path, contents, arch=arch, known=known, like=like)


def is_artifact(contents: weight_files.Contents) -> bool:
    """Return whether the contents of a file are an artifact."""
    return KEY in contents.metadata or (isinstance(contents.value, dict) and isinstance(contents.value.get(KEY), str))


def open_contents(
    path: Path,
    contents: weight_files.Contents,
    *,
    arch: str | None = None,
    known: ModelSpec | None = None,
    like: nn.Module | None = None,
) -> Model:
    """Rebuild the model of an artifact that has been read already; see `load` for arguments and errors."""
    in_metadata = KEY in contents.metadata
    text = contents.metadata[KEY] if in_metadata else contents.value[KEY]
    tensors = contents.value if in_metadata else contents.value.get("state_dict")
    manifest = _read_manifest(path, text, tensors)
    spec = _consented(path, manifest.spec, arch, known)
    bounded.check_size(spec, tensors, str(path))
    if like is not None and spec.arch.startswith(f"{registry.OBJECT}/"):
        registry.remember(like, spec.arch)
    model = registry.build(registry.without_pretrained(spec), pretrained=False, check=False)
    _fill(model, manifest.changes, _as_loaded(tensors, manifest.store_dtype), str(path))
    if manifest.fingerprint is not None:
        fixed_image.check(manifest.fingerprint, model, spec, str(path))
    return Model(model.eval(), spec, manifest.threat, manifest.provenance)


def _read_manifest(path: Path, text: str, tensors: Any) -> _Manifest:
    """Return the checked manifest of an artifact with these tensors."""
    try:
        value = json.loads(text)
        version = value["version"]
        if value["format"] != FORMAT or type(version) is not int or not isinstance(tensors, dict):
            raise ValueError(f"it is not of format {FORMAT!r}")
        if version > VERSION:
            raise UsageError(
                f"{path} has format version {version}, this robust-prune reads up to {VERSION}. Upgrade it."
            )
        manifest = from_json(_Manifest, {key: value[key] for key in _FIELDS if key in value})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = one_line(error)
        raise UsageError(f"the manifest of {path} is damaged: {said}") from error
    check_plain(value, f"the manifest of {path}")
    if version > 1:
        integrity.check(value, tensors, str(path))
    registry.check_values(manifest.spec)
    return manifest


def _consented(path: Path, spec: ModelSpec, arch: str | None, known: ModelSpec | None) -> ModelSpec:
    # A manifest may name any Python file on the user's disk and arguments for any of its functions, so a file is run
    # only if the user names it, or if the caller knows what the manifest says.
    if known is not None and spec != registry.without_pretrained(known):
        raise UsageError(
            f"{path} was not written by this run: it holds a {spec.arch}, and the run a {known.arch}, with other "
            "values. Remove it to have it made again."
        )
    if user_file.is_reference(spec.arch):
        if not spec.source_sha256:
            raise UsageError(f"the manifest of {path} is damaged: it lacks the hash of {spec.arch}")
        if arch is None and known is None:
            raise UsageError(
                f"{path} was built by {spec.arch}, and loading it runs that file. "
                f"If you trust it, add --arch {spec.arch}"
            )
        return replace(spec, arch=arch) if arch is not None else spec
    if arch is not None and arch != spec.arch:
        raise UsageError(f"{path} holds a {spec.arch}, not {arch}. Leave --arch out: the file knows its architecture.")
    registry.check_kwargs(spec)
    if "weights" in spec.kwargs:
        raise UsageError(f"{path} asks its architecture to download other weights. Refused.")
    return spec


def _written(manifest: _Manifest, tensors: Mapping[str, Tensor]) -> str:
    """Return the text of a manifest, with the hashes of the tensors."""
    try:
        value = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **to_json(manifest)}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"changes, kwargs and provenance must be plain JSON values: {error}") from error
    return json.dumps(integrity.sealed(value, tensors))


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
