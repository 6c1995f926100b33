"""Description of the machine in result files, and the checks of `doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..machine import host, nvml

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pyautoattack",
)
IMPORTED = ("torch", "torchvision", "timm", "torch_pruning", "onnx", "onnxscript")
MIN_PYTHON = (3, 11)
LOW_DISK_GIB = 2.0
LOW_MEMORY_GIB = 2.0

Status = Literal["ok", "warn", "fail"]


def snapshot() -> dict[str, Any]:
    """Return Python, platform, processor, memory, versions and device of the machine, for result files.

    No heavy packages are imported. Paths, host names and user names are not included.
    """
    return {
        "robust_prune": __version__,
        "commit": host.git_commit(),
        "python": platform.python_version(),
        "platform": host.platform_name(),
        "cpu": host.cpu_name(),
        "cores": host.usable_cores(),
        "memory_gib": host.memory_gib(),
        "versions": host.versions(PACKAGES),
        "device": host.device_name(),
    }


@dataclass(frozen=True)
class Check:
    """Result of one check of `doctor`.

    Attributes:
        name: name of the check.
        status: ``ok``, ``warn`` (works with limitations) or ``fail`` (`compress` will not run).
        detail: finding of the check.
        repair: command or advice that repairs it; empty if there is nothing to repair.
    """

    name: str
    status: Status
    detail: str
    repair: str = ""


@dataclass(frozen=True)
class Facts:
    """Input of the checks; `gather` collects it on the machine.

    Attributes:
        python: version of Python as numbers.
        installed: package versions, from `host.versions`.
        builds: versions of torch and torchvision with the build after the plus sign.
        requirements: requirements of robust-prune on this machine, e.g. ``torch>=2.9``.
        import_errors: error of each module that cannot be imported.
        session: whether `onnxruntime.InferenceSession` exists.
        provider_errors: reason for each provider on which a small model does not run.
        torch_cuda: CUDA version of the torch build; empty for a CPU build.
        gpu: name of the GPU that torch uses; empty without one.
        driver_gpus: names of the GPUs reported by the NVIDIA driver.
        bf16: whether the device supports bf16 in hardware.
        disk_gib: free space of the working directory in GiB.
        writable: whether the working directory is writable.
        free_memory_gib: available memory in GiB.
    """

    python: tuple[int, ...] = MIN_PYTHON
    installed: dict[str, str] = field(default_factory=dict)
    builds: dict[str, str] = field(default_factory=dict)
    requirements: tuple[str, ...] = ()
    import_errors: dict[str, str] = field(default_factory=dict)
    session: bool = True
    provider_errors: dict[str, str] = field(default_factory=dict)
    torch_cuda: str = ""
    gpu: str = ""
    driver_gpus: tuple[str, ...] = ()
    bf16: bool = False
    disk_gib: float = 100.0
    writable: bool = True
    free_memory_gib: float = 16.0


def gather() -> Facts:
    """Collect the facts of this machine; it imports all heavy packages and tolerates broken ones."""
    errors = {name: problem for name in IMPORTED if (problem := _import_problem(name))}
    torch = None if "torch" in errors else sys.modules["torch"]
    modules = {name: sys.modules[name] for name in ("torch", "torchvision") if name not in errors}
    cuda = torch is not None and torch.cuda.is_available()
    session = not _import_problem("onnxruntime") and hasattr(sys.modules["onnxruntime"], "InferenceSession")
    providers = ("cpu", "cuda", "tensorrt") if session and "onnx" not in errors else ()
    return Facts(
        python=tuple(sys.version_info[:3]),
        installed=host.versions(PACKAGES),
        builds={name: str(module.__version__) for name, module in modules.items()},
        requirements=_declared(),
        import_errors=errors,
        session=session,
        provider_errors={name: problem for name in providers if (problem := _provider_problem(name))},
        torch_cuda=str(torch.version.cuda or "") if torch is not None else "",
        gpu=str(torch.cuda.get_device_name()) if torch is not None and cuda else "",
        driver_gpus=tuple(gpu["name"] for gpu in nvml.gpus()),
        bf16=bool(torch.cuda.is_bf16_supported()) if torch is not None and cuda else host.cpu_has_bf16(),
        disk_gib=shutil.disk_usage(Path.cwd()).free / host.GIB,
        writable=_writable(),
        free_memory_gib=psutil.virtual_memory().available / host.GIB,
    )


def _import_problem(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def _declared() -> tuple[str, ...]:
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("robust-prune") or ()]
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(f"{r.name}{r.specifier}" for r in declared if r.marker is None or r.marker.evaluate({"extra": ""}))


def _provider_problem(provider: str) -> str:
    """Run a model of one node on the provider and return the problem; empty if it runs."""
    from onnx import TensorProto, helper

    from ..bench import providers, session

    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "probe", shapes[:1], shapes[1:])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(probe.SerializeToString())
        try:
            problem = providers.provider_problem(provider)
            if not problem:
                session.open_session(path, provider, threads=1, batch=1)
        except Exception as error:
            problem = str(error).splitlines()[0]
    return problem


def _writable() -> bool:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return True
    except OSError:
        return False


def doctor_checks(facts: Facts | None = None) -> tuple[Check, ...]:
    """Return the results of all checks of the machine, with repairs for problems.

    Args:
        facts: facts to check; by default those of this machine, which takes seconds since it imports torch.
    """
    known = gather() if facts is None else facts
    rules: tuple[Callable[[Facts], Iterator[Check]], ...] = (
        _python,
        _imports,
        _torch_pair,
        _versions,
        _onnxruntime,
        _cuda,
        _bf16,
        _disk,
        _memory,
    )
    return tuple(check for rule in rules for check in rule(known))


def _python(facts: Facts) -> Iterator[Check]:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        yield Check("Python", "fail", version, f"Make a virtual environment with Python {wanted} or newer.")
    else:
        yield Check("Python", "ok", version)


def _imports(facts: Facts) -> Iterator[Check]:
    for name, problem in facts.import_errors.items():
        if name != "torchvision":
            yield Check(name, "fail", f"does not import: {problem}", f"pip install --force-reinstall {name}")


def _torch_pair(facts: Facts) -> Iterator[Check]:
    torch, vision = facts.builds.get("torch", ""), facts.builds.get("torchvision", "")
    if not torch:
        return
    repair = 'pip install --upgrade --force-reinstall "torch>=2.9" torchvision'
    number, _, build = torch.partition("+")
    problem = facts.import_errors.get("torchvision", "")
    if problem:
        why = "they come from different builds" if "nms" in problem else "it does not import"
        detail = f"torch {torch} with torchvision {facts.installed.get('torchvision', '(missing)')}: {why}: {problem}"
        yield Check("torch and torchvision", "fail", detail, repair)
    elif build != vision.partition("+")[2]:
        detail = f"torch {torch} and torchvision {vision} are different builds: their operators may not match"
        yield Check("torch and torchvision", "warn", detail, repair)
    elif number == "2.13.0" and build:
        # Some machines offer pip a local CPU build of this release for which there is no torchvision.
        detail = f"torch {torch} is a local build that other packages were not built for"
        yield Check("torch and torchvision", "warn", detail, repair)
    else:
        yield Check("torch and torchvision", "ok", f"{torch}, {vision}")


def _versions(facts: Facts) -> Iterator[Check]:
    wrong = []
    for text in facts.requirements:
        need = Requirement(text)
        found = facts.installed.get(need.name)
        if found is None and need.name in PACKAGES and need.name not in ("onnxruntime", "onnxruntime-gpu"):
            wrong.append((text, f"{need.name} is missing (needs {text})"))
        elif found is not None and not need.specifier.contains(found, prereleases=True):
            wrong.append((text, f"{need.name} is {found} (needs {text})"))
    if wrong:
        wanted = " ".join(f'"{text}"' for text, _ in wrong)
        yield Check("versions", "fail", "; ".join(detail for _, detail in wrong), f"pip install {wanted}")
    elif facts.requirements:
        pruning = facts.installed.get("torch-pruning", "?")
        yield Check("versions", "ok", f"every package is in its range (torch-pruning {pruning})")


def _onnxruntime(facts: Facts) -> Iterator[Check]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in facts.installed]
    names = (Requirement(text).name for text in facts.requirements)
    wanted = next((name for name in names if name.startswith("onnxruntime")), "onnxruntime")
    repair = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {wanted}"
    if len(both) == 2:
        detail = "onnxruntime and onnxruntime-gpu are both installed; they share one folder and spoil each other"
        yield Check("onnxruntime", "fail", detail, repair)
    elif not both:
        yield Check("onnxruntime", "fail", "is not installed", f"pip install {wanted}")
    elif not facts.session:
        detail = f"{both[0]} has no InferenceSession: its files went when its sibling was uninstalled"
        yield Check("onnxruntime", "fail", detail, repair)
    elif "cpu" in facts.provider_errors:
        yield Check("onnxruntime", "fail", f"runs no model: {facts.provider_errors['cpu']}", repair)
    else:
        yield Check("onnxruntime", "ok", f"{both[0]} {facts.installed[both[0]]} runs models on the CPU")
        yield _cuda_provider(facts)
        if "cuda" not in facts.provider_errors:
            problem = facts.provider_errors.get("tensorrt", "")
            yield Check("onnxruntime TensorRT", "ok", f"not used: {problem}" if problem else "runs models on the GPU")


def _cuda_provider(facts: Facts) -> Check:
    problem = facts.provider_errors.get("cuda", "")
    if not problem:
        return Check("onnxruntime CUDA", "ok", "runs models on the GPU")
    if facts.gpu or facts.driver_gpus:
        repair = "pip install 'onnxruntime-gpu[cuda,cudnn]' (after uninstalling any other onnxruntime)"
        return Check("onnxruntime CUDA", "warn", f"there is a GPU, but {problem}", repair)
    return Check("onnxruntime CUDA", "ok", f"not used: {problem}")


def _cuda(facts: Facts) -> Iterator[Check]:
    if facts.gpu:
        yield Check("device", "ok", f"{facts.gpu}, torch for CUDA {facts.torch_cuda}")
    elif facts.driver_gpus:
        built = f"torch for CUDA {facts.torch_cuda}" if facts.torch_cuda else "a CPU build of torch"
        repair = "Install a torch build for your driver's CUDA version (pytorch.org/get-started), or update the driver."
        yield Check("device", "warn", f"{facts.driver_gpus[0]} is there, but {built} cannot use it", repair)
    else:
        yield Check("device", "ok", "no GPU: everything runs on the CPU, training takes hours instead of minutes")


def _bf16(facts: Facts) -> Iterator[Check]:
    found = "in hardware" if facts.bf16 else "not in hardware: float32 is used"
    yield Check("bfloat16", "ok", found)


def _disk(facts: Facts) -> Iterator[Check]:
    if not facts.writable:
        yield Check("working folder", "fail", "is not writable", "Change to a folder of yours, or pass --out.")
    elif facts.disk_gib < LOW_DISK_GIB:
        detail = f"{facts.disk_gib:.1f} GiB free: a run with checkpoints may need {LOW_DISK_GIB:.0f}"
        yield Check("working folder", "warn", detail, "Free some space, or pass --out on another disk.")
    else:
        yield Check("working folder", "ok", f"writable, {facts.disk_gib:.0f} GiB free")


def _memory(facts: Facts) -> Iterator[Check]:
    detail = f"{facts.free_memory_gib:.1f} GiB available"
    if facts.free_memory_gib < LOW_MEMORY_GIB:
        yield Check("memory", "warn", detail, "Close other programs, or lower the batch size.")
    else:
        yield Check("memory", "ok", detail)


def render_doctor(checks: tuple[Check, ...]) -> Table:
    """Return the checks as a table for a terminal, with repairs below the findings."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(title="robust-prune doctor", show_lines=False)
    for name in ("", "check", "found"):
        table.add_column(name)
    for check in checks:
        found = f"{check.detail}\n-> {check.repair}" if check.repair else check.detail
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", check.name, escape(found))
    return table
