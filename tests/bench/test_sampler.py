"""The protocol of timing, on workers that only pretend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.bench_sample import FakeWorker

from robust_prune.bench import sampler
from robust_prune.bench.sampler import Arm, Shape

CPU1 = Shape(batch=1, threads=1, provider="cpu", kind="host")


def test_every_block_visits_every_arm_once_in_an_order_that_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sampler, "_workers", lambda labels, provider: contextlib.nullcontext([FakeWorker(label) for label in labels])
    )

    def visits(seed: int) -> list[tuple[str, ...]]:
        FakeWorker.visits = []
        taken = sampler.measure([Arm(label, Path("x")) for label in "abc"], CPU1, 3.0, seed)
        assert len(taken) == 3 and all(arm.seconds.shape == taken[0].seconds.shape for arm in taken)
        return list(zip(*[iter(FakeWorker.visits)] * 3, strict=True))

    blocks = visits(0)
    assert len(blocks) >= 12
    assert all(sorted(block) == ["a", "b", "c"] for block in blocks)
    assert len(set(blocks)) == 6
    assert blocks == visits(0) != visits(1)


def test_processes_are_started_anew_unless_opening_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[list[str]] = []
    clock, opening = [0.0], [0.0]

    @contextlib.contextmanager
    def workers(labels: list[str], provider: str) -> Iterator[list[FakeWorker]]:
        opened.append(labels)
        clock[0] += opening[0]
        yield [FakeWorker(label) for label in labels]

    monkeypatch.setattr(sampler, "_workers", workers)
    monkeypatch.setattr(sampler, "monotonic", lambda: clock[0])
    for opening[0], launches in ((0.1, 5), (1.2, 2), (60.0, 1)):
        opened.clear()
        FakeWorker.visits = []
        shown: list[tuple[int, int]] = []
        taken = sampler.measure([Arm("a", Path("x"))], CPU1, 3.0, 0, lambda *done, s=shown: s.append(done))
        assert len(opened) == launches and taken[0].seconds.shape[0] == launches
        assert shown == [(n, len(shown)) for n in range(1, len(shown) + 1)] and len(shown) >= 12


def test_arms_are_opened_in_another_order_each_time_and_keep_their_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, ...]] = []

    class Unequal(FakeWorker):
        def ask(self, op: str, runs: int = 0, wake: int = 0, **rest: Any) -> dict[str, Any]:
            answer = super().ask(op, runs, wake, **rest)
            return answer if op == "open" else {"ns": [1_000_000 * int(self.label)] * runs}

    def workers(labels: list[str], provider: str) -> Any:
        opened.append(tuple(labels))
        return contextlib.nullcontext([Unequal(label) for label in labels])

    monkeypatch.setattr(sampler, "_workers", workers)
    FakeWorker.visits = []
    taken = sampler.measure([Arm(label, Path("x")) for label in "123"], CPU1, 1.0, 0)
    assert len(opened) == sampler.LAUNCHES and len(set(opened)) > 1
    assert [float(np.unique(arm.seconds).item()) for arm in taken] == pytest.approx([0.001, 0.002, 0.003])


def test_a_busy_machine_ends_the_blocks_early_but_never_below_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000_000, 10))
    monkeypatch.setattr(sampler, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        sampler, "_workers", lambda labels, provider: contextlib.nullcontext([FakeWorker(label) for label in labels])
    )
    FakeWorker.visits = []
    shown: list[tuple[int, int]] = []
    for seconds, blocks in ((3.0, 12), (10.0, 14)):
        taken = sampler.measure([Arm("a", Path("x"))], CPU1, seconds, 0, lambda *done: shown.append(done))
        assert taken[0].seconds.shape[:2] == (1, blocks)  # opening took longer than the blocks may: no second launch
        assert np.isfinite(taken[0].seconds).all() and (taken[0].seconds > 0).all()
        assert shown[-1][0] == shown[-1][1]


def test_warm_up_goes_on_until_it_is_stable_but_not_for_ever() -> None:
    steady, slow, never = FakeWorker("a"), FakeWorker("b", settles=9), FakeWorker("c")
    assert sampler._warm_up(steady) == pytest.approx(0.001) and steady.windows == 4  # type: ignore[arg-type]
    assert sampler._warm_up(slow) == pytest.approx(0.001) and slow.windows == 11  # type: ignore[arg-type]

    def unstable(**request: Any) -> dict[str, Any]:
        never.windows += 1
        return {"ns": [1_000_000 * (1 + never.windows % 2)] * request["runs"]}

    never.ask = unstable  # type: ignore[method-assign]
    sampler._warm_up(never)  # type: ignore[arg-type]
    assert never.windows == 1 + sampler.WARMUP_WINDOWS[1]
