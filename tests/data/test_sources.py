"""Data sets by name, made small and offline."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from builders.data_files import everything, write_npz

from robust_prune.commands.common import open_data, resolve
from robust_prune.data.class_names import BY_DATA
from robust_prune.data.sources import load_data
from robust_prune.errors import EnvironmentProblem


def test_a_prepared_npz_is_taken_for_a_known_name(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10.npz")
    bundle = load_data("cifar10", root=tmp_path)
    assert bundle.name == "cifar10" and bundle.class_names == BY_DATA["cifar10"]
    assert bundle.mean == (0.4914, 0.4822, 0.4465)


def test_the_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "svhn.npz")
    monkeypatch.setenv("ROBUST_PRUNE_DATA", str(tmp_path))
    assert load_data("svhn").class_names == tuple("0123456789")


@pytest.mark.parametrize("name", sorted(BY_DATA))
def test_offline_is_an_environment_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tried: list[str] = []

    def offline(url: Any, *_: Any, **__: Any) -> None:
        tried.append(str(url))
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(EnvironmentProblem, match=f"{name} is not in .* and cannot be downloaded") as raised:
        load_data(name, root=tmp_path)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value) and f"{name}.npz" in str(raised.value)
    assert tried


def test_cifar10_in_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(BY_DATA["cifar10"])}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists())
    bundle = load_data("cifar10", root=tmp_path, validation=10)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (90, 10, 20)
    raw = pickle.loads((folder / "test_batch").read_bytes())["data"]
    assert torch.equal(everything(bundle.test)[0], torch.from_numpy(raw).view(20, 3, 32, 32))


def test_fashion_mnist_keeps_one_channel(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels)
    bundle = load_data("fashion_mnist", root=tmp_path, validation=5)
    assert bundle.input_size == (1, 28, 28) and len(bundle.train) == 25
    assert torch.equal(everything(bundle.test)[0][:, 0], torch.from_numpy(images))


def test_commands_print_what_a_report_will_say_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_npz(tmp_path / "d.npz", class_names=np.array(["ant", "bee", "cat", "dog", "eel"]))
    bundle = open_data(resolve(None, {"data.name": str(path)}, None))
    told = " ".join(capsys.readouterr().out.split())
    assert bundle.notes and all(f"Note: {note}" in told for note in bundle.notes)
