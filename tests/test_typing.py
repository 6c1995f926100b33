"""What a checker of types sees of the public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from builders.places import ROOT


def test_a_checker_of_types_sees_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import robust_prune as rp\n"
        "card = rp.evaluate('demo', 'sample', 8 / 255, tier='pgd')\n"
        "robust: float = card.robust.value\n"
        "wrong: str = card.robust.value\n"
        "rp.compress('demo', 'sample', ratio='half')\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", str(script)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert "script.py:4" in told and "script.py:5" in told and "Found 2 errors" in told, told
