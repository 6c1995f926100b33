"""A tiny model trained on generated images, and ways to kill it: shared by the tests of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import TensorImages
from robust_prune.evaluation.card import ResultCard
from robust_prune.evaluation.evaluate import Subject, evaluate
from robust_prune.evaluation.files import ExportedModel
from robust_prune.recipe import EvaluationSection
from robust_prune.recipe_reader import make_section
from robust_prune.serialization import to_json

CLASSES = 3
THREAT = ThreatModel("linf", 8 / 255)


def generated(count: int, seed: int = 0) -> TensorImages:
    """Noisy images whose class is the channel that is a little brighter: hard enough for attacks to matter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 110 + 35 * torch.randn(count, 3, 8, 8, generator=generator)
    pixels[torch.arange(count), labels] += 14 + 8 * torch.randn(count, 1, 1, generator=generator)
    return TensorImages(pixels.round().clamp(0, 255).to(torch.uint8), labels)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x - 0.45))


def train_tiny() -> Tiny:
    torch.manual_seed(0)
    model, images = Tiny(), generated(384)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = images.images.float() / 255, images.labels
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


class KilledError(RuntimeError):
    pass


class DiesAfter(nn.Module):
    """Shares the trained model's weights; raises once it has been called `calls` times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = [10**9]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] -= 1
        if self.calls[0] < 0:
            raise KilledError
        return self.model(x)


class Mirrored:
    """A file that sees every image mirrored: points found on the model hardly harm it."""

    key = "mirrored"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return self.model(images.flip(-1))

    def predict(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1)


def evaluated(
    model: nn.Module,
    images: TensorImages,
    threat: ThreatModel,
    *,
    exported: Mapping[str, ExportedModel] | None = None,
    state_path: Path | None = None,
    **section: Any,
) -> ResultCard:
    """`evaluate` in fp32, with the values of its section as keywords."""
    settings = make_section(EvaluationSection, **{"precision": "fp32"} | section)
    return evaluate(
        model, images, threat, settings, subject=Subject("tiny", "generated"), exported=exported, state_path=state_path
    )


def same_but_for_time(a: ResultCard, b: ResultCard) -> bool:
    left, right = to_json(a), to_json(b)
    return {**left, "seconds": 0} == {**right, "seconds": 0}
