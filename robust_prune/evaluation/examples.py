"""Example images and their adversarial counterparts, for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..attacks import ThreatModel, frozen_eval
from ..data.base import ImageSet, as_floats, labels_of, stratified_order
from .scoring import score
from .worst_case import worst_points

STEPS = 20


def make_examples(
    models: Mapping[str, nn.Module],
    images: ImageSet,
    threat: ThreatModel,
    class_names: Sequence[str],
    *,
    attacked: str,
    count: int = 6,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Return images of distinct classes, attacked on one of the models, with the predictions of all models.

    Images are selected by their labels and never by predictions, so that the selection favours no model.

    Args:
        models: models by label, e.g. ``{"dense": ..., "pruned": ...}``; all on `device`.
        images: uint8 images and labels.
        threat: norm and radius.
        class_names: name of each class.
        attacked: label of the model that is attacked.
        count: number of images; classes repeat if there are fewer classes.
        seed: random seed of the attack, PGD with `STEPS` steps and one random start.
        device: device of the models.

    Returns:
        One dict for each image: ``image`` (uint8 [C, H, W]), ``adversarial`` (float32 [C, H, W] in [0, 1]), ``label``
        (str), ``predictions`` ({model label: {"clean": str, "adversarial": str}}).
    """
    chosen = _varied(images, count)
    raw, y = images.get(chosen)
    x, y = as_floats(raw, device), y.to(device)
    with frozen_eval(models[attacked]) as model:
        _, worst, _ = worst_points(model, x, y, threat, steps=STEPS, restarts=1, seed=seed)
    seen = {}
    for label, candidate in models.items():
        with frozen_eval(candidate) as model:
            seen[label] = {"clean": score(model, x, y)[0].tolist(), "adversarial": score(model, worst, y)[0].tolist()}

    def name(index: int) -> str:
        return class_names[index] if 0 <= index < len(class_names) else str(index)

    return [
        {
            "image": raw[i].cpu().numpy(),
            "adversarial": worst[i].cpu().numpy(),
            "label": name(int(y[i])),
            "predictions": {m: {k: name(v[i]) for k, v in p.items()} for m, p in seen.items()},
        }
        for i in range(len(chosen))
    ]


def _varied(images: ImageSet, count: int) -> torch.Tensor:
    """Return the positions of one image of each class, then of a second one and so on, up to `count`."""
    labels = labels_of(images)
    order = stratified_order(labels)
    seen: dict[int, int] = {}
    rounds = []
    for label in labels[order].tolist():
        rounds.append(seen.get(label, 0))
        seen[label] = seen.get(label, 0) + 1
    return order[torch.tensor(rounds).argsort(stable=True)[:count]]
