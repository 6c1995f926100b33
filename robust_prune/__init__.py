"""robust-prune: structured pruning of adversarially trained vision models, with measured latency and robust accuracy.

The public functions are imported when they are first used, so that ``import robust_prune`` is fast. See
`robust_prune.api` for a short example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        analyse,
        benchmark,
        compress,
        evaluate,
        export,
        finetune,
        frontier,
        load,
        load_data,
        plan,
        prune,
        save,
    )
    from .attacks.threat import ThreatModel
    from .data.base import DataBundle
    from .models.artifact import Model

_HOMES = {"ThreatModel": "attacks.threat", "DataBundle": "data.base", "Model": "models.artifact"}

__all__ = [
    "DataBundle", "Model", "ThreatModel", "__version__", "analyse", "benchmark", "compress", "evaluate", "export",
    "finetune", "frontier", "load", "load_data", "plan", "prune", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'robust_prune' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'api')}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
