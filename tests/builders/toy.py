"""A data set and a user's model file small enough for whole runs in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        def block(inputs, outputs, stride):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )
        self.stem = block(3, 16, 1)
        self.deep = nn.ModuleList([block(16, 16, 1) for _ in range(2)])
        self.down = block(16, 32, 2)
        self.last = block(32, 32, 1)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.deep:
            x = x + layer(x)
        return self.head(self.last(self.down(x)).mean((2, 3)))

def make_model(num_classes=3):
    return Net(num_classes)
"""

QUICK = [
    "--set", "sensitivity.images=64", "--set", "sensitivity.steps=3", "--set", "finetune.batch_size=32",
    "--set", "finetune.validation_images=30", "--set", "evaluation.steps=3", "--set", "bench.seconds=0.3",
    "--set", "bench.batches=[1, 4]", "--set", "pruning.repair_images=64", "--set", "threat.epsilon=4/255",
]  # fmt: skip


def write_data(path: Path, train: int = 240, test: int = 60) -> Path:
    """Three classes told apart by the brightest colour channel, as an .npz of 16x16 images."""
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 60
        return images, labels.astype(np.int64)

    (x_train, y_train), (x_test, y_test) = part(train), part(test)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def write_model(folder: Path) -> tuple[Path, Path]:
    """A user's ``model.py`` and a plain state_dict of a net trained for a moment on the toy colours."""
    source, weights = folder / "model.py", folder / "weights.pt"
    source.write_text(MODEL_FILE)
    scope: dict = {}
    exec(MODEL_FILE, scope)
    torch.manual_seed(0)
    net = scope["make_model"](3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(30):
        labels = torch.randint(3, (48,))
        images = torch.rand(48, 3, 16, 16) * 0.47
        images[torch.arange(48), labels] += 0.24
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((images - 0.3) / 0.2), labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), weights)
    return source, weights
