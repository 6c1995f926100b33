"""The folder on the GPU machine in which a job keeps what it was given, what it makes and what it found."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parents[1] / "results" / "gpu"
"""Results that an earlier occasion brought back."""


@dataclass(frozen=True)
class Work:
    """``items`` came in parcels, ``site`` holds installed wheels, ``data`` images, ``results`` a JSON file a phase."""

    root: Path

    @property
    def items(self) -> Path:
        """Files that came in parcels."""
        return self.root / "items"

    @property
    def data(self) -> Path:
        """Data sets, as ``ROBUST_PRUNE_DATA`` wants them."""
        return self.root / "data"

    @property
    def base(self) -> Path:
        """The dense base model."""
        return self.root / "base.safetensors"

    @property
    def partial(self) -> Path:
        """The best weights of a base whose training has not ended."""
        return self.root / "base-partial.safetensors"

    def newest_base(self) -> Path | None:
        """The finished or brought base, or the best weights of a training that has not ended, if they are newer."""
        there = [path for path in (self.base, self.partial) if path.exists()]
        return max(there, key=lambda path: path.stat().st_mtime, default=None)

    def result(self, phase: str) -> dict[str, Any]:
        """What a phase has found so far, here or on an earlier occasion; empty if nothing."""
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
        """Whether a phase has nothing left to do."""
        return self.result(phase).get("status") == "done"

    def save(self, phase: str, content: dict[str, Any], status: str = "partial") -> None:
        """Stores the findings of a phase: whole or not at all."""
        path = self.root / "results" / f"{phase}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        commit, now = self.root / "commit", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        packed = commit.read_text(encoding="utf-8") if commit.exists() else ""
        written = {**content, "phase": phase, "status": status, "written": now, "packed_at": packed}
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
