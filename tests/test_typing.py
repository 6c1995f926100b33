"""What a checker of types sees of the public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from builders.places import ROOT

SCRIPT = """
import robust_prune as rp
card = rp.evaluate('demo', 'sample', 8 / 255, tier='pgd')
robust: float = card.robust.value
wrong: str = card.robust.value
rp.compress('demo', 'sample', ratio='half')
"""
SETTINGS = """
[mypy]
follow_imports = silent
ignore_missing_imports = true
# Reading the types of all of torch takes half a minute, and the errors below are about ours.
[mypy-torch.*,torchvision.*,numpy.*,timm.*,rich.*,cyclopts.*,accelerate.*,scipy.*,onnx.*,PIL.*]
follow_imports = skip
"""


def test_a_checker_of_types_sees_them(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.strip() + "\n")
    (tmp_path / "mypy.ini").write_text(SETTINGS.strip() + "\n")
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "script.py"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False).stdout
    assert "script.py:4" in told and "script.py:5" in told and "Found 2 errors" in told, told
