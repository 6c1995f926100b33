"""What a run prints at its end: the table, alarms, notes, files and the time."""

from __future__ import annotations

from collections.abc import Mapping

from ..console import alarm, console, duration, warn
from ..runs.run import Run
from .summary import warnings
from .table import headline_table
from .text import moment
from .types import RunReport


def show(report: RunReport) -> None:
    """Print the headline table, the alarms with the models to which they belong, and the notes."""
    console.print(headline_table(report))
    for sentence in warnings(report):
        alarm(sentence)
    for note in dict.fromkeys(report.notes):
        warn(note)


def show_end(report: RunReport, run: Run, files: Mapping[str, str]) -> None:
    """Print a report, the files of its run folder and the time that the run took.

    Args:
        report: the report; for a finished run the one that was written then.
        run: the run.
        files: what each file is, by its name in the run folder.
    """
    show(report)
    paths = {str(run.folder / name): words for name, words in files.items()}
    for path, words in paths.items():
        console.print(f"{path:<{max(map(len, paths))}}  {words}", markup=False, soft_wrap=True)
    if run.made:
        console.print(f"Finished in {run.total()}.", markup=False)
        return
    took, when = duration(sum(report.seconds.values())), moment(report.created)
    console.print(f"Already done: nothing was computed (finished in {took}, {when}).", markup=False)
