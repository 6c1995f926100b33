"""Commands that a user may want next, with the paths of this run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..console import console
from ..recipe import DataSection, Recipe


def say_next(*commands: Sequence[str]) -> None:
    """Print commands as lines that can be pasted into a shell."""
    for head, command in zip(("Next:", *["     "] * len(commands)), commands, strict=False):
        console.print(f"{head} {shlex.join(['robust-prune', *command])}", markup=False, soft_wrap=True)


def after_compress(folder: Path, recipe: Recipe, arch: str | None) -> None:
    """Print how to attack the pruned model harder, to time it otherwise, and to compare the run with another."""
    model, onnx = str(folder / "model.safetensors"), str(folder / "model.onnx")
    say_next(
        ["evaluate", model, *_same(folder, recipe, arch), "--onnx", onnx, "--tier", "aa-fast"],
        ["bench", str(folder / "dense.onnx"), onnx, "--batch", "1,8", "--threads", "1,2"],
        ["report", str(folder), "ANOTHER_RUN", "--out", "runs/compared"],
    )


def after_train(folder: Path, recipe: Recipe) -> None:
    """Print how to compress the trained model."""
    model = str(folder / "model.safetensors")
    say_next(["compress", model, *_same(folder, recipe, recipe.model.arch), "--ratio", "0.5"])


def _same(folder: Path, recipe: Recipe, arch: str | None) -> list[str]:
    """Return the flags for the data and, for a user's architecture, the place of its file."""
    from ..models import user_file

    plain = recipe.data == DataSection(name=recipe.data.name) and recipe.data.name is not None
    data = ["--data", str(recipe.data.name)] if plain else ["--recipe", str(folder / "recipe.yaml")]
    return [*data, *(["--arch", arch] if arch and user_file.is_reference(arch) else [])]
