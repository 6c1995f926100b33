"""The process that times one file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.bench_sample import classifier

from robust_prune.bench import session, worker
from robust_prune.bench.session import open_session
from robust_prune.errors import EnvironmentProblem
from robust_prune.machine.child import Child


def test_device_rows_run_on_bound_memory_and_give_the_same_logits(tmp_path: Path) -> None:
    opened, takes = open_session(classifier(tmp_path / "m.onnx"), "cpu", threads=1, batch=2)
    images = session.example(takes.batched(2, "m"), takes.dtype, seed=0)
    (logits,) = worker.runner(opened, takes.name, images, "host", "cpu")()
    run_bound, taken, (made,) = worker.bound(opened, takes.name, images, "cpu")
    run_bound()
    np.testing.assert_array_equal(made.numpy(), logits)
    taken.update_inplace(np.zeros_like(images))
    run_bound()
    np.testing.assert_array_equal(made.numpy(), opened.run(None, {takes.name: np.zeros_like(images)})[0])
    assert worker.runner(opened, takes.name, images, "device", "cpu")() is None


def test_a_graph_that_replays_old_inputs_is_refused(tmp_path: Path) -> None:
    """The CPU provider captures nothing: as it is, it is a sound graph; one that runs only once, a stale one."""
    opened, takes = open_session(classifier(tmp_path / "m.onnx"), "cpu", threads=1, batch=2)
    images, other = (session.example(takes.batched(2, "m"), takes.dtype, seed=seed) for seed in (0, 1))

    class Stale:
        ran = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(opened, name)

        def run_with_iobinding(self, binding: Any) -> None:
            if not self.ran:
                opened.run_with_iobinding(binding)
            self.ran += 1

    assert worker.replayed(opened, opened, takes.name, images, other, "cpu")() is None
    with pytest.raises(EnvironmentProblem, match=r"CUDA graph gives other logits.*kind device"):
        worker.replayed(opened, Stale(), takes.name, images, other, "cpu")


def test_the_worker_holds_no_torch_and_keeps_prints_out_of_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, robust_prune.bench.worker; assert not {'torch', 'rich'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, json\nloads = json.loads\n"
        "def noisy(text, **kw):\n    print('a library prints')\n    return loads(text, **kw)\njson.loads = noisy\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request = {"op": "open", "path": str(classifier(tmp_path / "m.onnx")), "provider": "cpu", "threads": 1}
    child = Child("the worker", "robust_prune.bench.worker")
    answer, _ = child.ask({**request, "batch": 1, "kind": "host", "seed": 0}, seconds=60)
    child._log.seek(0)
    assert b"a library prints" in child._log.read()
    child.close()
    assert answer["shape"] == [1, 3, 8, 8]
