"""Help, at once and for every verb."""

from __future__ import annotations

import subprocess
import sys

import pytest

from robust_prune import cli


def test_help_names_every_criterion(capsys):
    from robust_prune.catalogue import ALLOCATIONS, CRITERIA

    cli.main(["compress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in (*CRITERIA.names, *ALLOCATIONS.names))


def test_help_answers_without_importing_the_heavy_packages():
    code = (
        "import sys\nfrom robust_prune import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'torch_pruning', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for verb in ("compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor", "recipes"):
        assert verb in ran.stdout


@pytest.mark.parametrize("verb", ["compress", "train", "sensitivity", "evaluate", "export", "bench", "doctor"])
def test_every_verb_has_help(verb, capsys):
    cli.main([verb, "--help"])
    assert f"robust-prune {verb}" in capsys.readouterr().out
