"""What looks at a few images only looks at all classes, also where the set is sorted by class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.evaluation_sample import CLASSES, THREAT, Tiny, evaluated, generated

from robust_prune.data.base import TensorImages
from robust_prune.evaluation import evaluate, passes


@pytest.fixture
def by_class() -> TensorImages:
    images = generated(330, seed=1)
    order = images.labels.argsort(stable=True)
    return TensorImages(images.images[order], images.labels[order])


def test_alarms_black_box_and_other_radii(
    trained: Tiny, by_class: TensorImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def recorded(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(model: Any, x: torch.Tensor, y: torch.Tensor, *args: Any, **keywords: Any) -> Any:
            seen[name] = torch.cat([seen.get(name, y[:0]), y])
            return original(model, x, y, *args, **keywords)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(passes, "BLACK_BOX_QUERIES", 5)
    monkeypatch.setattr(passes, "SWEEP_IMAGES", 60)
    monkeypatch.setattr("robust_prune.evaluation.worst_case.APGD_STEPS", 2)
    for module, name in ((evaluate, "behaviour_flags"), (passes, "square"), (passes, "worst_points")):
        recorded(module, name)
    card = evaluated(trained, by_class, THREAT, tier="apgd", steps=1, restarts=1, sweep=(2 / 255,))
    assert sorted(seen["behaviour_flags"].bincount().tolist()) == [21, 21, 22]
    for name, labels in seen.items():
        assert len(labels.unique()) == CLASSES, f"{name} saw {labels.unique().tolist()}"
    assert card.sweep[0][1].total == 60
    assert [(part.label, part.total) for part in card.per_class] == [(0, 110), (1, 110), (2, 110)]
