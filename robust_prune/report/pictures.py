"""Images of the HTML report as inline PNG: originals, perturbations and adversarial images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SIDE = 160


@dataclass(frozen=True)
class Verdict:
    """Predictions of one model for an image and for its adversarial version, and whether they are correct."""

    model: str
    clean: str
    clean_right: bool
    adversarial: str
    adversarial_right: bool


@dataclass(frozen=True)
class Example:
    """An image with its perturbation and its adversarial version.

    Attributes:
        label: name of the true class.
        original, perturbation, attacked: the pictures as data URIs.
        amplification: factor of the perturbation in its picture.
        verdicts: predictions of the models.
    """

    label: str
    original: str
    perturbation: str
    attacked: str
    amplification: float
    verdicts: tuple[Verdict, ...]


def data_uri(image: NDArray[np.uint8]) -> str:
    """Return a uint8 image [C, H, W], with C of 1 or 3, as an inline PNG of at most 160 pixels on each side."""
    array = np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_bytes(image: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.round(image * 255), 0, 255), dtype=np.uint8)


def strips(examples: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Return the pictures of `examples` from `make_examples`; all perturbations have the same amplification."""
    deltas = [np.asarray(e["adversarial"]) - np.asarray(e["image"]).astype(np.float64) / 255 for e in examples]
    largest = max((float(np.abs(d).max()) for d in deltas), default=0.0)
    gain = 0.5 / largest if largest > 0 else 1.0
    return [_strip(example, delta, gain) for example, delta in zip(examples, deltas, strict=True)]


def _strip(example: Mapping[str, Any], delta: NDArray[np.floating[Any]], gain: float) -> Example:
    label = str(example["label"])
    verdicts = tuple(
        Verdict(model, said["clean"], said["clean"] == label, said["adversarial"], said["adversarial"] == label)
        for model, said in example["predictions"].items()
    )
    return Example(
        label=label,
        original=data_uri(np.asarray(example["image"], dtype=np.uint8)),
        perturbation=data_uri(_to_bytes(0.5 + gain * delta)),
        attacked=data_uri(_to_bytes(np.asarray(example["adversarial"]))),
        amplification=gain,
        verdicts=verdicts,
    )
