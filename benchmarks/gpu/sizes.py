"""Amount of work of each phase, on a GPU and in the rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Set:
    """One latency measurement: the files of `arch` at a batch size and a kind (``host``, ``device`` or ``graph``)."""

    arch: str
    batch: int
    kind: str


@dataclass(frozen=True)
class Sizes:
    """Amount of work of a job.

    Attributes:
        device: ``cuda`` or ``cpu``.
        providers: execution providers in the order of measurement; those that do not run on the machine are skipped.
        architectures: (name, image size in pixels) of the models whose latency is measured.
        sets: latency measurements, the most informative first; a later job resumes with those left at the deadline.
        latency_seconds: seconds of timed runs for each set.
        speed: architecture, batch size, attack steps and rounds of the training loops, and losses to compile.
        base: architecture and settings of the dense base model; its epochs depend on the available time.
        most_epochs: largest number of epochs of the base model.
        train_images: number of training images; None for all.
        ratios: ratios of compression, in order.
        compression: overrides of the recipe.
        seconds: time budget of each phase in seconds, in order.
    """

    device: str
    providers: tuple[str, ...]
    architectures: tuple[tuple[str, int], ...]
    sets: tuple[Set, ...]
    latency_seconds: float
    speed: dict[str, Any]
    base: dict[str, Any]
    most_epochs: int
    train_images: int | None
    ratios: tuple[float, ...]
    compression: dict[str, Any]
    seconds: dict[str, float]


_MODELS = (
    ("cifar/resnet18", 32),
    ("timm/resnet50", 224),
    ("cifar/resnet20_x2", 32),
    ("cifar/mobilevit_xs", 32),
    ("cifar/vgg16_bn", 32),
    ("timm/vit_tiny_patch16_224", 224),
)
# For every model a single image with a CUDA graph and a full batch come before all other rows.
_FIRST = {32: ((1, "graph"), (256, "device")), 224: ((1, "graph"), (64, "device"))}
_ROWS = tuple((batch, kind) for kind in ("host", "device", "graph") for batch in (1, 8, 64, 256))


def _sets() -> tuple[Set, ...]:
    first = [Set(arch, *row) for arch, side in _MODELS for row in _FIRST[side]]
    return tuple(dict.fromkeys([*first, *(Set(arch, *row) for row in _ROWS for arch, _ in _MODELS)]))


GPU = Sizes(
    device="cuda",
    providers=("cuda", "tensorrt"),
    architectures=_MODELS,
    sets=_sets(),
    latency_seconds=1.5,
    speed={
        "arch": "cifar/resnet18", "batch": 512, "steps": 10, "rounds": 5, "compiled": ("pgd_at", "trades", "n_fgsm"),
    },
    base={
        "arch": "cifar/resnet18", "loss": "pgd_at", "steps": 10, "batch_size": 512, "lr": 0.3, "warmup": 0.2,
        "ema_decay": 0.995, "validation_images": 1000,
    },
    most_epochs=30,
    train_images=None,
    ratios=(0.75, 0.9, 0.5),
    compression={
        "finetune.loss": "pgd_at", "finetune.steps": 10, "finetune.epochs": 4, "finetune.batch_size": 512,
        "finetune.lr": 0.1, "finetune.warmup": 0.2, "finetune.ema_decay": 0.98, "finetune.validation_images": 1000,
        "evaluation.tier": "aa-fast", "evaluation.images": 2000, "evaluation.batch_size": 1000,
    },
    seconds={"facts": 40, "latency": 110, "speed": 90, "base": 220, "compression": 200},
)  # fmt: skip

TOY = Sizes(
    device="cpu",
    providers=("cpu", "tensorrt"),
    architectures=(("cifar/resnet20", 32),),
    sets=(Set("cifar/resnet20", 1, "host"), Set("cifar/resnet20", 4, "device")),
    latency_seconds=0.5,
    speed={"arch": "cifar/resnet20", "batch": 16, "steps": 2, "rounds": 2, "compiled": ("n_fgsm",)},
    base={
        "arch": "cifar/resnet20", "loss": "pgd_at", "steps": 2, "batch_size": 64, "lr": 0.1, "warmup": 0.2,
        "ema_decay": 0.9, "validation_images": 32, "validation_steps": 2,
    },
    most_epochs=3,
    train_images=1500,
    ratios=(0.5,),
    compression={
        "finetune.loss": "pgd_at", "finetune.steps": 2, "finetune.epochs": 1, "finetune.batch_size": 64,
        "finetune.lr": 0.05, "finetune.validation_images": 32, "sensitivity.images": 64, "sensitivity.steps": 2,
        "pruning.repair_images": 64, "evaluation.tier": "aa-fast", "evaluation.images": 8,
    },
    seconds={"facts": 60, "latency": 60, "speed": 120, "base": 60, "compression": 240},
)  # fmt: skip
