"""What all tests of training need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from robust_prune.training import trainer


@pytest.fixture(autouse=True)
def _comparable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Timing decides the memory layout, and the layout the rounding: fixed here so that runs can be compared.
    monkeypatch.setattr(trainer, "choose_precision", lambda model, x: trainer.Precision(False, False))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
