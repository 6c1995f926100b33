"""Fixtures of more than one folder."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the processes of `pytest -n auto`, and those that tests start, share the cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import pytest
from builders.evaluation_sample import Tiny, generated, train_tiny
from builders.users_loss import LOSSES_FILE

from robust_prune.data.base import TensorImages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_PRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


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
