"""robust-prune report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .. import recipe_reader
from ..catalogue import TIERS
from ..console import console
from ..errors import UsageError
from .common import check_out_folder, command_line, listed, open_data
from .flags import EVALUATION, RUN, ArchFlag, CacheFlag, DataFlag

if TYPE_CHECKING:
    from ..report.types import RunReport

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
    reevaluate: Annotated[
        str | None,
        Parameter(
            group=EVALUATION,
            help="Attack the models of all runs anew by this tier, with the threat model, the test images and the "
            "settings of the first run, for runs whose attacks differ; a frontier is taken as its single runs. "
            f"{TIERS.help()}.",
        ),
    ] = None,
    data: DataFlag = None,
    arch: ArchFlag = None,
    cache: CacheFlag = None,
) -> None:
    """Write the report of a finished run again, or compare several runs in one table and one plot."""
    if not runs:
        raise UsageError("no run given. Try: robust-prune report runs/one runs/two --out runs/both")
    check_out_folder("--out", out)
    if (out / "run.json").exists():
        raise UsageError(f"--out {out} is the folder of a run, whose report would be replaced. Name another one.")
    if reevaluate is None:
        unused = [flag for flag, value in (("--data", data), ("--arch", arch)) if value is not None]
        if unused:
            raise UsageError(
                f"{unused[0]} is for models that are evaluated again. Add --reevaluate pgd, or leave it out."
            )

    from ..report import export as exporting
    from ..report.compare import compare, load_run, run_names
    from ..report.files import write
    from ..report.terminal import show

    wanted = listed(export) or []
    if export is not None:
        exporting.check_formats(wanted or [export])
        check_out_folder("--export", out / FIGURES)
    folders = _single_runs(runs) if reevaluate is not None else list(runs)
    loaded = dict(zip(run_names(folders), map(load_run, folders), strict=True))
    if reevaluate is not None:
        found = {name: (folder, loaded[name]) for name, folder in zip(loaded, folders, strict=True)}
        loaded = _attacked_anew(found, {"evaluation.tier": reevaluate, "data.name": data}, arch, cache, out)
    joint = compare(loaded, command_line()) if len(loaded) > 1 else next(iter(loaded.values()))
    write(joint, out)
    files = exporting.export(joint, out / FIGURES, wanted)
    show(joint)
    for file in (out / "report.html", *files):
        console.print(str(file), markup=False, soft_wrap=True)


def _single_runs(runs: Sequence[Path]) -> list[Path]:
    """Return the folders of the runs, with the single runs in place of a frontier."""
    from ..runs.audit import points

    folders = [run.parent if run.is_file() else run for run in runs]
    return [single for folder in folders for single in points(folder) or [folder]]


def _attacked_anew(
    runs: Mapping[str, tuple[Path, RunReport]],
    settings: Mapping[str, str | None],
    arch: str | None,
    cache: str | None,
    out: Path,
) -> dict[str, RunReport]:
    """Return the reports of runs, by name, with accuracies measured as the first run did, but for `settings`.

    Raises:
        UsageError: the first folder has no recipe, its data cannot be read, or as `reevaluate`.
        QualityGateError: as `reevaluate`.
    """
    tier, (folder, first) = str(settings["evaluation.tier"]), next(iter(runs.values()))
    if not TIERS.is_builtin(tier):
        TIERS.load(tier)
    if any(run.class_names != first.class_names for _, run in runs.values()):
        raise UsageError("the runs' models tell different classes apart, so no images can judge them all.")
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(
            f"{folder} holds no recipe.yaml, which says how it was evaluated. Give the whole folder of a run."
        )
    # Nothing of this recipe runs but the tier, which the user has named.
    recipe = recipe_reader.load(str(folder / "recipe.yaml"), settings)
    bundle = open_data(recipe)

    from ..evaluation.kept import Terms
    from ..machine.host import tune_allocator
    from ..reevaluation import reevaluate
    from ..runs.cache import Cache

    tune_allocator()
    return reevaluate(runs, Terms(bundle, recipe, Cache.named(cache)), out, arch)
