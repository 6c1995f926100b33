"""Child processes end with their parent, and never keep it waiting."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from robust_prune.errors import EnvironmentProblem
from robust_prune.machine.child import Child

GREEDY = """
import resource
import psutil
from robust_prune.machine.child import serve

limit = psutil.Process().memory_info().vms + (64 << 20)

def answer(request, payload):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return {"size": len(payload)}, b""

serve(answer)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_request_beyond_the_memory_of_the_child_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greedy_child.py").write_text(GREEDY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("the greedy process", "greedy_child")
    assert child.ask({}, b"abc", seconds=30)[0]["size"] == 3
    begin = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="the greedy process ended"):
        child.ask({}, bytes(200 << 20), seconds=30)
    assert time.monotonic() - begin < 10
    child.close()
