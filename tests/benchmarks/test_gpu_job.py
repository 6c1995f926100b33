"""The GPU job without a GPU: parcels arrive whole, plans fit the time, and the rehearsal runs every phase."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.places import BENCHMARKS
from torch import nn

sys.path[:0] = [str(BENCHMARKS / "gpu"), str(BENCHMARKS)]

import images as sheets  # noqa: E402
import job  # noqa: E402
import pack  # noqa: E402
import parcels  # noqa: E402
import report  # noqa: E402
import skeletons  # noqa: E402
from sizes import GPU, TOY  # noqa: E402
from work import Work  # noqa: E402

from robust_prune.exporters.onnx import export_onnx  # noqa: E402

MACHINE = json.loads((BENCHMARKS / "gpu" / "machine.json").read_text(encoding="utf-8"))


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Three parcels of at most 100 bytes with two files across them."""
    generator = np.random.default_rng(0)
    contents = {"a.whl": generator.bytes(130), "b.zip": generator.bytes(90)}
    (tmp_path / "made").mkdir()
    for name, content in contents.items():
        (tmp_path / "made" / name).write_bytes(content)
    files = [("wheel" if name.endswith("whl") else "images", tmp_path / "made" / name) for name in contents]
    items = parcels.split(files, tmp_path / "parcels", 100, "abc")
    assert [item.pieces for item in items] == [(1, 2), (2, 3)]
    return tmp_path / "parcels", contents


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 2, 3, 1, 1)])
def test_parcels_become_the_files_again_in_any_order(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, order: tuple[int, ...]
) -> None:
    folder, contents = packed
    for n in order:
        parcels.take(folder / f"parcel-{n}", tmp_path / "store")
    assert all((tmp_path / "store" / "items" / name).read_bytes() == content for name, content in contents.items())
    assert parcels.missing(folder / "parcel-1", tmp_path / "store") == []
    assert not list((tmp_path / "store" / "pieces").iterdir())


def test_a_parcel_that_arrived_damaged_is_named_and_may_be_copied_again(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, contents = packed
    broken = shutil.copytree(folder / "parcel-1", tmp_path / "broken")
    piece = next(path for path in broken.iterdir() if path.name.startswith("a.whl"))
    piece.write_bytes(b"0" + piece.read_bytes()[1:])
    parcels.take(broken, tmp_path / "store")
    with pytest.raises(SystemExit, match=r"a\.whl came out with other bytes.*Copy its parcels again: 1, 2\."):
        parcels.take(folder / "parcel-2", tmp_path / "store")
    assert parcels.missing(folder / "parcel-1", tmp_path / "store") == ["a.whl", "b.zip"]
    parcels.take(folder / "parcel-1", tmp_path / "store")
    assert (tmp_path / "store" / "items" / "a.whl").read_bytes() == contents["a.whl"]
    with pytest.raises(SystemExit, match="is no parcel"):
        parcels.take(tmp_path, tmp_path / "store")
    for text in ("{", "[]", "{}", '{"commit": "a", "items": [{"name": 1}]}'):
        (broken / parcels.MANIFEST).write_text(text)
        with pytest.raises(SystemExit, match=r"parcel\.json is damaged"):
            parcels.take(broken, tmp_path / "store")


def test_a_file_of_another_set_replaces_the_one_of_the_same_name(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        (tmp_path / "base.safetensors").write_bytes(content)
        parcels.split([("base", tmp_path / "base.safetensors")], tmp_path / "parcels", 100, "abc")
        job.take(tmp_path / "parcels" / "parcel-1", Work(tmp_path / "work"))
        assert Work(tmp_path / "work").base.read_bytes() == content


def test_what_could_not_be_installed_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    parcels.split([("wheel", tmp_path / "broken-1.0-py3-none-any.whl")], tmp_path / "parcels", 100, "abc")
    for _ in range(2):
        with pytest.raises(SystemExit, match="the wheels cannot be installed"):
            job.take(tmp_path / "parcels" / "parcel-1", Work(tmp_path / "work"))


@pytest.mark.parametrize("count", [40, 77])
def test_images_come_out_of_their_sheets_as_they_went_in(tmp_path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": generator.integers(0, 256 if kind == "x" else 10, shape, dtype=np.uint8)
        for split in ("train", "test")
        for kind, shape in (("x", (count, 32, 32, 3)), ("y", (count,)))
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    packed = pack.pack_images(tmp_path / "cifar10.npz", tmp_path)
    with np.load(sheets.unpack(packed, tmp_path / "data")) as back:
        assert set(back.files) == set(arrays)
        assert all(np.array_equal(back[name], value) for name, value in arrays.items())


def test_a_skeleton_is_small_and_runs_once_it_is_filled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    images = torch.rand(16, 3, 8, 8)
    export_onnx(model, tmp_path / "whole.onnx", images, manifest={})
    skeletons.strip(tmp_path / "whole.onnx", tmp_path / "bare.onnx")
    assert 10 * (tmp_path / "bare.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    skeletons.fill(tmp_path / "bare.onnx", tmp_path / "filled.onnx")
    shapes = [
        {t.name: list(t.dims) for t in onnx.load(tmp_path / f"{n}.onnx").graph.initializer} for n in ("whole", "filled")
    ]
    assert shapes[0] == shapes[1]
    session = onnxruntime.InferenceSession(tmp_path / "filled.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    assert logits.shape == (16, 10) and np.isfinite(logits).all() and np.ptp(logits) > 0


def test_the_parcels_bring_what_the_machine_lacks_and_nothing_that_it_has() -> None:
    wheels = pack.wanted_wheels(MACHINE)
    assert {"torch-pruning", "onnxruntime-gpu", "pydantic", "cyclopts"} <= set(wheels)
    assert not {"torch", "numpy", "pyautoattack", "onnxruntime"} & set(wheels)


def test_the_calls_run_every_phase_once_its_files_are_there_in_less_than_thirteen_minutes() -> None:
    items = [
        parcels.Item("skeletons.zip", "skeletons", 1, "", (1,)),
        parcels.Item("ort.whl", "wheel", 1, "", (1, 2, 3, 4, 5)),
        parcels.Item("cifar10.zip", "images", 1, "", (5, 6, 7)),
    ]
    calls = pack.calls(Path("p"), items, GPU, toy=False)
    assert sum(planned for _, planned, _ in calls) < 13 * 60
    assert [place for place, _, _ in calls] == [f"p/parcel-{n}" for n in range(1, 8)]
    assert [number for number, (_, _, command) in enumerate(calls, 1) if " run " in command] == [5, 7]
    assert "--phases facts,latency,speed" in calls[4][2] and "--phases" not in calls[6][2]
    assert set(GPU.seconds) == set(TOY.seconds) == set(job.PHASES)
    # One command may take ten minutes.
    assert all(planned < 600 for _, planned, _ in calls)


def test_a_phase_that_an_earlier_occasion_finished_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("work.COMMITTED", tmp_path / "committed")
    here, earlier = Work(tmp_path / "here"), tmp_path / "committed"
    earlier.mkdir()
    (earlier / "speed.json").write_text('{"status": "done", "speed": 1}')
    (earlier / "latency.json").write_text('{"status": "partial", "tables": [1]}')
    assert here.done("speed") and not here.done("latency") and not here.done("facts")
    assert here.result("latency")["tables"] == [1]
    for damaged in ('{"status": "do', "[]"):
        (earlier / "facts.json").write_text(damaged)
        assert here.result("facts") == {}
    here.save("latency", {"tables": [1, 2]}, "done")
    assert here.done("latency") and here.result("latency")["tables"] == [1, 2]


def test_what_comes_back_is_few_files_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "MOST_BYTES", 1000)
    work = Work(tmp_path / "work")
    for phase in job.PHASES:
        work.save(phase, {"some": "thing"})
    work.partial.write_bytes(bytes(range(256)) * 6)
    names = job.deliver(work, tmp_path / "out")
    assert names[:2] == ["base.json", "base.safetensors.00"] and len(names) == 7
    joined = b"".join((tmp_path / "out" / name).read_bytes() for name in names if name.startswith("base.s"))
    assert joined == work.partial.read_bytes()


def test_the_report_says_what_is_unfinished_and_leaves_out_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("work.COMMITTED", tmp_path)
    monkeypatch.setattr(report, "COMMITTED", tmp_path)
    with pytest.raises(SystemExit, match="holds no results"):
        report.main()
    base = {
        "arch": "cifar/resnet18", "settings": {"loss": "pgd_at", "steps": 10}, "plan": {"epochs": 30},
        "train_images": 49000, "continued": False, "status": "partial",
    }  # fmt: skip
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "speed.json").write_text('{"status": "done"}')
    (tmp_path / "latency.json").write_text('{"status": "done", "tables": [], "failed": []}')
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert "not yet all of 30 epochs of 49,000 images; not at its end" in text
    assert "Not finished: the phase goes on another time." in text
    assert "speed.json is not as the phase writes it" in text
    assert "No set was measured." in text


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("flags", [[], ["--kill"]])
def test_the_whole_job_runs_from_its_parcels_under_the_machines_packages_alone(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu" / "rehearse.py"), *flags], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "rehearsed: every phase came to its end" in done.stdout
