"""robust-prune report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..console import console
from ..errors import UsageError
from .common import check_out_folder, command_line, listed
from .flags import RUN

FIGURES = "figures"


def report(
    *runs: Annotated[Path, Parameter(group=RUN, help="Run folders.", show_default=False)],
    out: Annotated[
        Path, Parameter(group=RUN, help="Folder that receives report.html, result.json and the tables.")
    ] = Path("runs/report"),
    export: Annotated[
        str | None,
        Parameter(
            group=RUN,
            help="Also write every figure and the table for papers, into the folder figures of --out: svg, pdf, latex, "
            "or several with commas.",
        ),
    ] = None,
) -> None:
    """Write the report of a finished run again, or compare several runs in one table and one plot."""
    if not runs:
        raise UsageError("no run given. Try: robust-prune report runs/one runs/two --out runs/both")
    check_out_folder("--out", out)

    from ..report import export as exporting
    from ..report.compare import compare, load_run, run_names
    from ..report.files import write
    from ..report.terminal import show

    wanted = listed(export) or []
    if export is not None:
        exporting.check_formats(wanted or [export])
        check_out_folder("--export", out / FIGURES)
    loaded = dict(zip(run_names(runs), map(load_run, runs), strict=True))
    joint = compare(loaded, command_line()) if len(loaded) > 1 else next(iter(loaded.values()))
    write(joint, out)
    files = exporting.export(joint, out / FIGURES, wanted)
    show(joint)
    for file in (out / "report.html", *files):
        console.print(str(file), markup=False, soft_wrap=True)
