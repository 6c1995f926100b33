"""Fixtures of more than one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.evaluation_sample import Tiny, generated, train_tiny
from builders.users_loss import LOSSES_FILE

from robust_prune.data.base import TensorImages


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, entered."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained() -> Tiny:
    return train_tiny()


@pytest.fixture(scope="module")
def images() -> TensorImages:
    return generated(150, seed=1)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's file of losses."""
    file = tmp_path / "mine.py"
    file.write_text(LOSSES_FILE, encoding="utf-8")
    return file
