"""Figures of a report as SVG and PDF files, and its table as LaTeX, for papers and slides."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup

from ..errors import EnvironmentProblem, UsageError
from ..report import breakdown, charts, layers, svg
from ..runs.files import atomic_write, write_text
from .table import caption, headline_cells
from .types import RunReport

FORMATS = ("svg", "pdf", "latex")
FIGURES: Mapping[str, Callable[[RunReport], Markup]] = {
    "tradeoff": charts.tradeoff,
    "speedups": charts.speedups,
    "layers": layers.layers,
    "by_class": breakdown.by_class,
    "by_radius": breakdown.by_radius,
    "accuracy": lambda run: charts.accuracy_curves(run.history, run.start),
    "loss": lambda run: charts.loss_curve(run.history),
}
"""Figures by the names of their files."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00d7": r"$\times$", "\u2212": r"$-$", "\u2013": "--",
    "\u2192": r"$\rightarrow$", "<": r"\textless{}", ">": r"\textgreater{}", "\n": " ",
}  # fmt: skip


def check_formats(wanted: Sequence[str]) -> None:
    """Check that all formats can be written.

    Raises:
        UsageError: a format is unknown.
        EnvironmentProblem: PDF was asked for and svglib is not installed.
    """
    for name in wanted:
        if name not in FORMATS:
            raise UsageError(f"--export takes {', '.join(FORMATS)}, or several with commas; got {name!r}.")
    if "pdf" in wanted:
        _svglib()


def export(run: RunReport, folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Write the figures and the table of a report to a folder, and return the paths of the files.

    Figures that the run has nothing to show for are left out. PDF text is in Helvetica, which has Latin letters only.

    Args:
        run: the report.
        folder: folder of the files, which is created if it does not exist.
        wanted: formats, of `FORMATS`.

    Raises:
        UsageError, EnvironmentProblem: as `check_formats`, or the folder cannot be written.
    """
    check_formats(wanted)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(run)
        if not figure:
            # Those of an earlier report would be taken for figures of this one.
            for kind in {"svg", "pdf"} & set(wanted):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
            continue
        alone = svg.standalone(figure)
        if "svg" in wanted:
            written.append(folder / f"{name}.svg")
            write_text(written[-1], alone)
        if "pdf" in wanted:
            written.append(folder / f"{name}.pdf")
            atomic_write(written[-1], partial(_write, to_pdf(alone)))
    if "latex" in wanted:
        written.append(folder / "table.tex")
        write_text(written[-1], to_latex(run))
    return written


def _write(contents: bytes, path: Path) -> None:
    path.write_bytes(contents)


def to_pdf(drawing: str) -> bytes:
    """Return an SVG drawing as a PDF of one page of its size.

    Raises:
        EnvironmentProblem: svglib is not installed.
    """
    from reportlab.graphics import renderPDF

    # svglib would draw the tooltips.
    found = _svglib()(io.StringIO(re.sub(r"<title>.*?</title>", "", drawing, flags=re.DOTALL)))
    stream = io.BytesIO()
    # Without the time of writing, equal reports give equal files.
    renderPDF.drawToFile(found, stream, "", invariant=1)
    return stream.getvalue()


def _svglib() -> Callable[[io.StringIO], object]:
    try:
        from svglib.svglib import svg2rlg
    except ImportError as error:
        raise EnvironmentProblem(
            "PDF figures need svglib. Install it: pip install 'robust-prune[pdf]', or export svg."
        ) from error
    return svg2rlg


def to_latex(run: RunReport) -> str:
    """Return the headline table as a LaTeX ``tabular`` with the rules of booktabs, and its caption as a comment."""
    heads, rows = headline_cells(run)
    lines = [f"% {' '.join(caption(run).split())}", f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [_line(heads), r"\midrule", *map(_line, rows), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    # A cell that begins with a bracket or a star would be read as part of the line break before it.
    shown = ["".join(LATEX.get(letter, letter) for letter in cell) for cell in cells]
    return " & ".join(f"{{}}{cell}" if cell.startswith(("[", "*")) else cell for cell in shown) + r" \\"
