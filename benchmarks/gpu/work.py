"""Folder of a job on the GPU machine, with its inputs, models and results."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parents[1] / "results" / "gpu"
"""Results of earlier jobs."""


@dataclass(frozen=True)
class Work:
    """Folder of a job: ``items`` from parcels, wheels in ``site``, images in ``data``, JSON by phase in ``results``."""

    root: Path

    @property
    def items(self) -> Path:
        """Folder of the files from parcels."""
        return self.root / "items"

    @property
    def data(self) -> Path:
        """Folder of data sets, for ``ROBUST_PRUNE_DATA``."""
        return self.root / "data"

    @property
    def base(self) -> Path:
        """Path of the dense base model."""
        return self.root / "base.safetensors"

    @property
    def partial(self) -> Path:
        """Path of the best weights of a base model whose training has not ended."""
        return self.root / "base-partial.safetensors"

    def newest_base(self) -> Path | None:
        """Return the newer of the complete base model and the best weights of an unfinished training, or None."""
        there = [path for path in (self.base, self.partial) if path.exists()]
        return max(there, key=lambda path: path.stat().st_mtime, default=None)

    def result(self, phase: str) -> dict[str, Any]:
        """Return the results of a phase so far, from this or an earlier job; empty without any."""
        for folder in (self.root / "results", COMMITTED):
            path = folder / f"{phase}.json"
            if path.exists():
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    print(f"{path.name} cannot be read and is left out: {error}", file=sys.stderr)
                    continue
                if isinstance(found, dict):
                    return found
                print(f"{path.name} holds no object and is left out", file=sys.stderr)
        return {}

    def done(self, phase: str) -> bool:
        """Return whether a phase is complete."""
        return self.result(phase).get("status") == "done"

    def save(self, phase: str, content: dict[str, Any], status: str = "partial") -> None:
        """Store the results of a phase atomically."""
        path = self.root / "results" / f"{phase}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        commit, now = self.root / "commit", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        packed = commit.read_text(encoding="utf-8") if commit.exists() else ""
        written = {**content, "phase": phase, "status": status, "written": now, "packed_at": packed}
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
