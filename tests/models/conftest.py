"""A user's file, for the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.model_files import USER_FILE


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(USER_FILE)
    return path
