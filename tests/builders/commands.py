"""Commands as a user types them."""

from __future__ import annotations

from typing import Any

import pytest

from builders.toy import QUICK
from robust_prune import cli, compression, outcome

STAGES: dict[str, Any] = dict.fromkeys(
    ("preflight", "analyse", "apply", "train", "export_model", "evaluate"), compression
) | {"run_section": outcome}
"""What the stages of `compress` call to do their work."""


def fails(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr().err


def compress(out: str, *more: str) -> None:
    cli.main(
        ["compress", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.5",
         "--epochs", "1", "--out", out, *QUICK, *more]
    )  # fmt: skip
