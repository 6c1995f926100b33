"""The snapshot tells nothing private; doctor finds each known trap and prints its repair."""

from __future__ import annotations

import getpass
import io
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders.places import ROOT
from rich.console import Console

from robust_prune.machine import host
from robust_prune.machine.snapshot import Check, Facts, doctor_checks, render_doctor, snapshot

SOUND = Facts(
    python=(3, 12, 1),
    installed={
        "torch": "2.15.0",
        "torchvision": "0.29.2",
        "timm": "1.0.31",
        "torch-pruning": "1.6.1",
        "onnxruntime-gpu": "1.31.1",
    },
    builds={"torch": "2.15.0+cu132", "torchvision": "0.29.2+cu132"},
    requirements=("torch>=2.9", "torch-pruning>=1.6.1,<1.7", "onnxruntime-gpu>=1.20"),
    provider_errors={"cuda": "there is no NVIDIA driver on this machine."},
    torch_cuda="13.2",
)


def found(facts: Facts, name: str) -> Check:
    return next(check for check in doctor_checks(facts) if check.name == name)


def test_a_sound_machine_has_nothing_to_repair() -> None:
    checks = doctor_checks(SOUND)
    assert {check.status for check in checks} == {"ok"}
    assert not any(check.repair for check in checks)
    assert [c.name for c in checks] == list(dict.fromkeys(c.name for c in checks))


NMS = "operator torchvision::nms does not exist"
BOTH = {**SOUND.installed, "onnxruntime": "1.31.1"}
REPAIR_ORT = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
PAIR = "torch and torchvision"


@pytest.mark.parametrize(
    ("facts", "name", "status", "detail", "repair"),
    [
        (replace(SOUND, python=(3, 10, 4)), "Python", "fail", "3.10.4", "Python 3.11 or newer"),
        (replace(SOUND, import_errors={"timm": "no module"}), "timm", "fail", "no module", "--force-reinstall timm"),
        (
            replace(SOUND, import_errors={"torchvision": NMS}, builds={"torch": "2.13.0+cpu"}),
            PAIR,
            "fail",
            "torch 2.13.0+cpu with torchvision 0.29.2: they come from different builds",
            '"torch>=2.9" torchvision',
        ),
        (replace(SOUND, import_errors={"torchvision": "libjpeg"}), PAIR, "fail", "does not import: libjpeg", "pip"),
        (
            replace(SOUND, builds={"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu132"}),
            PAIR,
            "warn",
            "different builds",
            "--force-reinstall",
        ),
        (
            replace(SOUND, builds={"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}),
            PAIR,
            "warn",
            "local build",
            '"torch>=2.9"',
        ),
        (
            replace(SOUND, installed={**SOUND.installed, "torch-pruning": "1.7.0"}),
            "versions",
            "fail",
            "torch-pruning is 1.7.0",
            'pip install "torch-pruning',
        ),
        (
            replace(SOUND, installed={"torch": "2.15.0", "onnxruntime-gpu": "1.31.1"}),
            "versions",
            "fail",
            "torch-pruning is missing",
            "<1.7",
        ),
        (replace(SOUND, installed=BOTH), "onnxruntime", "fail", "both installed", REPAIR_ORT),
        (replace(SOUND, installed=BOTH, session=False), "onnxruntime", "fail", "both installed", REPAIR_ORT),
        (replace(SOUND, session=False), "onnxruntime", "fail", "onnxruntime-gpu has no InferenceSession", REPAIR_ORT),
        (replace(SOUND, provider_errors={"cpu": "boom"}), "onnxruntime", "fail", "runs no model: boom", REPAIR_ORT),
        (replace(SOUND, installed={}), "onnxruntime", "fail", "is not installed", "pip install onnxruntime-gpu"),
        (replace(SOUND, gpu="H100"), "onnxruntime CUDA", "warn", "there is a GPU, but", "onnxruntime-gpu[cuda,cudnn]"),
        (replace(SOUND, driver_gpus=("H100",), torch_cuda=""), "device", "warn", "CPU build of torch", "pytorch.org"),
        (replace(SOUND, writable=False), "working folder", "fail", "not writable", "--out"),
        (replace(SOUND, disk_gib=0.5), "working folder", "warn", "0.5 GiB free", "Free some space"),
        (replace(SOUND, free_memory_gib=1.0), "memory", "warn", "1.0 GiB available", "batch size"),
    ],
)
def test_each_trap_is_found_with_its_repair(facts: Facts, name: str, status: str, detail: str, repair: str) -> None:
    check = found(facts, name)
    assert check.status == status
    assert detail in check.detail and repair in check.repair


def test_a_gpu_that_works_is_named() -> None:
    facts = replace(SOUND, gpu="H100", bf16=True, provider_errors={})
    assert found(facts, "device").detail == "H100, torch for CUDA 13.2"
    assert found(facts, "onnxruntime CUDA").detail == "runs models on the GPU"
    assert found(facts, "bfloat16").detail == "in hardware"


def test_this_machine_is_judged_and_the_table_shows_every_repair_in_full() -> None:
    checks = doctor_checks()
    assert {"Python", "onnxruntime", "device", "working folder", "memory"} <= {check.name for check in checks}
    assert found(Facts(), "onnxruntime").status == "fail"
    bad = Check("onnxruntime", "warn", "found [x]", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    out = io.StringIO()
    Console(file=out, width=120).print(render_doctor((*checks, bad)))
    for text in ("found [x]", "-> pip install 'onnxruntime-gpu[cuda,cudnn]'", *(check.name for check in checks)):
        assert text in out.getvalue()


def test_snapshot_names_versions_and_device_but_no_host_user_or_folder() -> None:
    taken = snapshot()
    text = json.dumps(taken)
    assert json.loads(text) == taken
    assert {"robust_prune", "python", "platform", "cpu", "cores", "memory_gib", "versions", "device"} <= set(taken)
    assert {"torch", "timm", "torch-pruning", "onnx", "numpy"} <= set(taken["versions"])
    assert taken["cores"] >= 1 and taken["memory_gib"] > 0
    for private in (str(Path.home()), str(ROOT), sys.prefix):
        assert private not in text
    words = {word.strip('",') for word in text.split()}
    assert not words & {platform.node(), getpass.getuser()}


def test_snapshot_imports_nothing_heavy() -> None:
    code = (
        "import sys; from robust_prune.machine.snapshot import snapshot; snapshot();"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_is_what_the_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_container_limit", lambda: 1.5 * host.GIB)
    assert host.memory_gib() == 1.5


def test_a_package_outside_a_checkout_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "__file__", str(tmp_path / "robust_prune" / "machine" / "host.py"))
    assert host.git_commit() is None
