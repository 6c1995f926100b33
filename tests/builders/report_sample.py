"""A made-up run that fills every part of a report; shared by the report tests, its figures measure nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robust_prune.attacks import ThreatModel
from robust_prune.bench.types import LatencyRow, Ratio
from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.evaluation.card import Accuracy, ResultCard
from robust_prune.exporters.types import OnnxArtifact, Parity
from robust_prune.report import ModelRow, RunReport
from robust_prune.sensitivity.profile import ModuleSensitivity, SensitivityProfile
from robust_prune.structure.types import Skipped
from robust_prune.training.types import EpochRecord, Start

THREAT = ThreatModel("linf", 8 / 255)
WHOLE = "backbone.layer3.2.conv1"


def epoch(number: int, train_loss: float, val_clean: float = 0.5, val_robust: float = 0.3) -> EpochRecord:
    return EpochRecord(number, train_loss, 0.4, val_clean, val_robust, "average", 0.02, 9.0)


def card(model: str, clean: int, robust: int, total: int = 500, flags: tuple[str, ...] = ()) -> ResultCard:
    return ResultCard(
        model=model, data="cifar10-sample", split="test", tier="pgd",
        attack="PGD-20, 2 random restarts, cross-entropy, fp32 verdict", threat=THREAT, clean=Accuracy(clean, total),
        robust=Accuracy(robust, total), flags=flags, forwards=21000, backwards=20000, seconds=12.5, seed=0,
    )  # fmt: skip


def latency(label: str, batch: int, p50: float, speedup: Ratio | None, noisy: bool = False) -> LatencyRow:
    return LatencyRow(
        label=label, path=f"{label}.onnx", provider="CPUExecutionProvider", kind="host", batch=batch, threads=1,
        samples=140, p50_ms=p50, p50_low=p50 * 0.99, p50_high=p50 * 1.015, p90_ms=p50 * 1.08, p95_ms=p50 * 1.1,
        p99_ms=None, images_per_second=1000 * batch / p50, speedup=speedup, noisy=noisy,
    )  # fmt: skip


def artifact(label: str, size: int) -> OnnxArtifact:
    parity = Parity((1, 7, 32), 64, 3.1e-6, 2.9e-6, 1.0, True)
    return OnnxArtifact(f"{label}.onnx", size, 18, "ab" * 32, 0, parity)


def sample_run(**changes: Any) -> RunReport:
    layers = ["backbone.conv1"] + [
        f"backbone.layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3) for block in (0, 1, 2) for conv in (1, 2)
    ]
    modules = tuple(
        ModuleSensitivity(name, "Conv2d", 2.4 * math.exp(-0.22 * i) * (1 + 0.5 * math.sin(3 * i)), 4.0, (0.1, 0.2))
        for i, name in enumerate(layers)
    )
    groups = tuple(
        PlannedGroup(name, 32 * 2 ** (i // 7), tuple(range(0, (4 + 3 * i) // 4 * 4 * (name != WHOLE))), modules[i].mrs)
        for i, name in enumerate(layers)
        if not name.endswith("conv2")
    )
    history = tuple(
        epoch(e, 1.9 * math.exp(-0.1 * e) + 0.3, 0.70 - 0.25 * math.exp(-0.5 * e), 0.42 - 0.18 * math.exp(-0.4 * e))
        for e in range(1, 9)
    )  # fmt: skip
    values: dict[str, Any] = {
        "title": "demo, half the arithmetic",
        "command": "robust-prune compress demo --ratio 0.5 --out runs/demo",
        "recipe": {"model": "demo", "ratio": 0.5, "finetune": {"epochs": 8, "loss": "trades"}},
        "notes": ("Figures on the embedded sample are indicative: 500 test images, a short fine-tuning.",),
        "models": (
            ModelRow("dense", 160_200_000, 1_080_000, 4_350_000, card("dense", 376, 203), Accuracy(376, 500),
                     Accuracy(203, 500), artifact("dense", 4_350_000),
                     (latency("dense", 1, 3.12, None), latency("dense", 32, 88.4, None))),
            ModelRow("pruned", 80_050_000, 512_000, 2_110_000, card("pruned", 361, 194), Accuracy(361, 500),
                     Accuracy(194, 500), artifact("pruned", 2_110_000),
                     (latency("pruned", 1, 1.93, Ratio(1.62, 1.58, 1.66, "faster")),
                      latency("pruned", 32, 52.6, Ratio(1.68, 1.66, 1.70, "faster")))),
        ),
        "profile": SensitivityProfile("boundary", 0.1, (0.05, 0.1), "max", 1.61, 512, 0, THREAT, modules),
        "plan": PruningPlan(0.5, "macs", "mrs", "adversarial_taylor", 8, groups, (), 160_200_000, 80_050_000,
                            1_080_000, 512_000),
        "rolled_back": (Skipped(WHOLE, "mask parity failed: largest difference 0.3"),),
        "history": history,
        "start": Start(0.43, 0.2, 500, 10),
        "environment": {"cpu": "a processor", "cores": 2, "versions": {"torch": "2.15.0", "onnxruntime": "1.31.1"}},
        "seconds": {"sensitivity": 4.2, "prune": 1.1, "finetune": 71.0, "evaluate": 33.0, "bench": 21.0},
        "created": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "latency_protocol": "Interleaved in random blocks, one process a file, 140 runs each",
        "noise_floor": {"1 x 1": (1.001, 0.996, 1.007), "32 x 1": (0.999, 0.994, 1.004)},
    }  # fmt: skip
    return RunReport(**{**values, **changes})


def sample_examples(count: int = 4) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    grid = np.linspace(0, 1, 32)
    examples = []
    for i in range(count):
        image = np.stack([np.outer(grid, grid**c) for c in (0.3, 1, 2 + i)])
        picture = np.round(255 * image).astype(np.uint8)
        clean = picture.astype(np.float32) / 255
        noise = (8 / 255 * np.sign(generator.standard_normal(image.shape))).astype(np.float32)
        examples.append({
            "image": picture,
            "adversarial": np.clip(clean + noise, 0, 1),
            "label": ("cat", "ship", "frog", "truck")[i % 4],
            "predictions": {
                "dense": {"clean": ("cat", "ship", "frog", "truck")[i % 4], "adversarial": ("dog", "ship")[i % 2]},
                "pruned": {"clean": ("cat", "ship", "deer", "truck")[i % 4], "adversarial": "dog"},
            },
        })  # fmt: skip
    return examples
