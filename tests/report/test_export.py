"""Figures and the table of a report as files for papers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from builders.report_sample import sample_run

from robust_prune import cli
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.report.export import FORMATS, export, to_latex
from robust_prune.report.files import write

DRAWN = {"tradeoff", "speedups", "layers", "accuracy", "loss"}


def test_every_figure_is_a_document_of_its_own(tmp_path: Path) -> None:
    files = export(sample_run(), tmp_path, ("svg",))
    assert {file.stem for file in files} == DRAWN
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and int(root.attrib["width"]) > 300
        assert "var(" not in file.read_text() and ".bar.main" in file.read_text()


def test_equal_reports_give_equal_pdf_files_without_tooltips(tmp_path: Path) -> None:
    pytest.importorskip("svglib")
    once, twice = (export(sample_run(), tmp_path / name, ("pdf",)) for name in "ab")
    assert {file.stem for file in once} == DRAWN
    for one, two in zip(once, twice, strict=True):
        assert one.read_bytes() == two.read_bytes() and one.read_bytes().startswith(b"%PDF")


def test_the_table_is_a_latex_tabular() -> None:
    run = sample_run()
    models = (run.models[0], replace(run.models[1], label="50_% & more"))
    lines = to_latex(replace(run, models=models)).splitlines()
    assert lines[0].startswith("% Robust: PGD-20") and lines[1] == r"\begin{tabular}{lrrr}"
    assert lines[3] == r" & dense & 50\_\% \& more & change \\"
    assert r"Latency b1, ms & 3.12 [3.09, 3.17] & 1.93 [1.91, 1.96] & 1.62$\times$ [1.58, 1.66] \\" in lines
    assert len({line.count(" & ") for line in lines[5:-2]}) == 1 and lines[-1] == r"\end{tabular}"


def test_text_of_others_does_not_leave_its_place_in_latex() -> None:
    run = sample_run()
    assert run.models[0].card is not None
    hostile = replace(run.models[0], card=replace(run.models[0].card, data="x\n\\input{secret}\n%"), label="*")
    joint = replace(run, models=(hostile, run.models[1], replace(run.models[1], label="*3")))
    lines = to_latex(joint).splitlines()
    assert lines[0].startswith("% ") and "input{secret}" in lines[0] and lines[1].startswith(r"\begin{tabular}")
    assert sum(line.startswith("{}*") for line in lines) == 2


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    export(sample_run(), tmp_path, ("svg",))
    (tmp_path / "mine.svg").write_text("mine")
    export(replace(sample_run(), history=(), start=None), tmp_path, ("svg",))
    assert {file.stem for file in tmp_path.iterdir()} == DRAWN - {"accuracy", "loss"} | {"mine"}


def test_formats_are_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--export takes svg, pdf, latex, or several with commas; got 'png'"):
        export(sample_run(), tmp_path, ("svg", "png"))
    monkeypatch.setitem(sys.modules, "svglib.svglib", None)
    with pytest.raises(
        EnvironmentProblem, match=r"PDF figures need svglib\. Install it: pip install 'robust-prune\[pdf"
    ):
        export(sample_run(), tmp_path, FORMATS)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(sample_run(), tmp_path / "run")
    cli.app(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--export", "svg, latex"])
    found = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert found == {f"{name}.svg" for name in DRAWN} | {"table.tex"}
    assert str(tmp_path / "out" / "figures" / "table.tex") in capsys.readouterr().out
    for wrong in ("png", ",", ""):
        with pytest.raises(UsageError, match="--export takes"):
            cli.app(["report", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--export", wrong])
    assert not (tmp_path / "other").exists()
