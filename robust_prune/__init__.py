"""robust-prune: makes adversarially trained vision models physically smaller and proves what is left.

The functions below are imported when they are first used, so that ``import robust_prune`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "compress": ("compress", "compress"),
    "measure_sensitivity": ("sensitivity.estimators", "measure"),
    "plan": ("budget.plan", "make_plan"),
    "prune": ("surgery.apply", "apply"),
    "finetune": ("training.trainer", "train"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "export_onnx": ("export.onnx", "export_onnx"),
    "benchmark": ("bench.latency", "run"),
    "load": ("models.artifact", "load"),
    "save": ("models.artifact", "save"),
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'robust_prune' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return list(__all__)
