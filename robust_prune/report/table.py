"""The headline table: models side by side, one figure in each line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from ..bench.types import LatencyRow
from ..console import FOLDED, FirstThatFits
from ..evaluation.card import Accuracy
from ..report import text
from .types import ModelRow, RunReport

MAX_LATENCY_LINES = 3
SIDE_BY_SIDE = 2
LatencyKey = tuple[str, str, int, int]


@dataclass(frozen=True)
class Cell:
    """A figure: its value, its 95 % interval and its change relative to the first model; the latter may be empty."""

    value: str
    interval: str = ""
    change: str = ""

    @property
    def plain(self) -> str:
        """Value and interval in one line."""
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        short: label in the terminal, with the unit.
        label, detail: label and conditions on the HTML page.
        unit: unit of the values on the HTML page.
        cells: one cell for each model.
    """

    short: str
    label: str
    detail: str
    unit: str
    cells: tuple[Cell, ...]


def key_of(row: LatencyRow) -> LatencyKey:
    """Return the conditions of a measurement, which must be equal for two latencies to be compared."""
    return row.provider, row.kind, row.batch, row.threads


def latency_keys(run: RunReport) -> list[LatencyKey]:
    """Return the conditions of all models' measurements, in order and without repeats."""
    return list(dict.fromkeys(key_of(row) for model in run.models for row in model.latency))


def find_latency(model: ModelRow, key: LatencyKey) -> LatencyRow | None:
    """Return the model's measurement under the conditions `key`, or None."""
    return next((row for row in model.latency if key_of(row) == key), None)


def headline_lines(run: RunReport) -> list[Line]:
    """Return all lines of the table; lines without any value are left out."""
    first = run.models[0] if run.models else None
    if first is None:
        return []
    lines = [
        _count_line(run, "MACs", "for one image", lambda m: m.macs, text.quantity),
        _count_line(run, "Parameters", "", lambda m: m.params, text.quantity),
        _count_line(run, "ONNX file", "", lambda m: m.file_bytes, lambda v: text.file_size(int(v))),
    ]
    keys = latency_keys(run)
    lines += [_latency_line(run, key, keys) for key in keys[:MAX_LATENCY_LINES]]
    card = next((m.card for m in run.models if m.card), None)
    images = f"{card.clean.total:,} {card.split} images" if card else ""
    attack = f"{text.attack_name(card)}, {text.threat_name(card)}, tier {card.tier}" if card else ""
    lines += [
        _accuracy_line(run, "Clean acc.", "Clean accuracy", images, lambda m: m.card.clean if m.card else None),
        _accuracy_line(run, "Robust acc.", "Robust accuracy", attack, lambda m: m.card.robust if m.card else None),
        _accuracy_line(run, "ONNX clean", "ONNX file, clean", "the file itself", lambda m: m.onnx_clean),
        _accuracy_line(
            run, "ONNX robust", "ONNX file, robust", "asked at the points of the attack", lambda m: m.onnx_robust
        ),
    ]
    return [line for line in lines if any(cell.value != text.NONE for cell in line.cells)]


def _count_line(
    run: RunReport, label: str, detail: str, get: Callable[[ModelRow], int | None], show: Callable[[float], str]
) -> Line:
    base = get(run.models[0])
    cells = []
    for position, model in enumerate(run.models):
        value = get(model)
        change = text.relative(value, base) if position else ""
        cells.append(Cell(text.NONE if value is None else show(value), "", change))
    return Line(label, label, detail, "", tuple(cells))


def _latency_line(run: RunReport, key: LatencyKey, keys: list[LatencyKey]) -> Line:
    provider, kind, batch, threads = key
    cells = []
    for position, model in enumerate(run.models):
        row = find_latency(model, key)
        if row is None:
            cells.append(Cell(text.NONE))
            continue
        digits = text.decimals(row.p50_ms)
        change = text.speedup(row.speedup) if position else ""
        cells.append(
            Cell(f"{row.p50_ms:.{digits}f}{doubted(row)}", text.span(row.p50_low, row.p50_high, digits), change)
        )
    detail = f"median, batch {batch}, {_threads(threads)}, {provider.removesuffix('ExecutionProvider')}, {kind}"
    return Line(f"Latency {short_latency(key, keys)}, ms", "Latency", detail, " ms", tuple(cells))


def doubted(row: LatencyRow) -> str:
    """Return a star for a latency that should be measured again; `caption` says why."""
    return "*" if row.doubts else ""


def short_latency(key: LatencyKey, keys: list[LatencyKey]) -> str:
    """Return a short name of the conditions that differ between measurements, e.g. ``b32 t2``."""
    _, kind, batch, threads = key
    kinds = {k[1] for k in keys}
    many_threads = len({k[3] for k in keys if k[3]}) > 1
    named = len(kinds) > 1 and (kind != "host" or kinds != {"host", "defaults"})
    return f"b{batch}" + (f" t{threads}" if many_threads and threads else "") + (f" {kind}" if named else "")


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}" if count else "ONNX Runtime's own threads (defaults)"


def _accuracy_line(
    run: RunReport, short: str, label: str, detail: str, get: Callable[[ModelRow], Accuracy | None]
) -> Line:
    base = get(run.models[0])
    cells = []
    for position, model in enumerate(run.models):
        accuracy = get(model)
        if accuracy is None or not accuracy.total:
            cells.append(Cell(text.NONE))
            continue
        change = text.points(accuracy, base) if position else ""
        cells.append(Cell(f"{100 * accuracy.value:.1f}", text.accuracy_span(accuracy), change))
    return Line(f"{short}, %", label, detail, " %", tuple(cells))


def caption(run: RunReport) -> str:
    """Return sentences on the attack, the latency measurement and the intervals of the table."""
    sentences = []
    card = next((m.card for m in run.models if m.card), None)
    if card:
        sentences.append(
            f"Robust: {card.attack} under {text.threat_name(card)} (tier {card.tier}), {card.clean.total:,} images of "
            f"{card.data} ({card.split})."
        )
    rows = [row for m in run.models for row in m.latency]
    if rows:
        threads = ", ".join(_threads(t) for t in dict.fromkeys(row.threads for row in rows))
        providers = ", ".join(dict.fromkeys(row.provider.removesuffix("ExecutionProvider") for row in rows))
        sentences.append(f"Latency: median, ONNX Runtime {providers}, {threads}.")
    if doubts := dict.fromkeys(doubt for row in rows for doubt in row.doubts):
        sentences.append(f"* in doubt: {'; '.join(doubts)}.")
    if not is_wide(run) and any(robust is not None and robust.right for robust in map(shown_robust, run.models[1:])):
        sentences.append("Changes of accuracy: on the same images, in pairs.")
    if card or rows:
        sentences.append("Brackets: 95 % intervals.")
    return " ".join(sentences)


def is_wide(run: RunReport) -> bool:
    """Return whether the models are listed below each other, which is the case for more than two."""
    return len(run.models) > SIDE_BY_SIDE


def wide_heads(run: RunReport, brief: bool = False) -> list[str]:
    """Return the column headings of the table with one line for each model; see `wide_rows`."""
    keys = latency_keys(run)[: 1 if brief else MAX_LATENCY_LINES]
    times = [f"{short_latency(key, keys)}, ms" for key in keys]
    sizes = ["MACs", "file"] if brief else ["MACs", "params", "file"]
    return ["model", *sizes, *times, *(["clean", "robust"] if brief else ["clean, %", "robust, %"])]


def wide_rows(run: RunReport, brief: bool = False) -> list[list[Cell]]:
    """Return one line for each model: label, size, latencies with speed-ups, and accuracies.

    Accuracies are those of the ONNX file if they were measured, else those of the torch model.

    Args:
        run: the report.
        brief: whether to leave out columns so that the table fits into 80 characters.
    """
    keys = latency_keys(run)[: 1 if brief else MAX_LATENCY_LINES]
    rows = []
    for position, model in enumerate(run.models):
        base = run.models[0] if position else None
        row = [Cell(model.label), Cell(text.quantity(model.macs))]
        row += [] if brief else [Cell(text.quantity(model.params))]
        row.append(Cell(text.file_size(model.file_bytes)))
        for key in keys:
            found = find_latency(model, key)
            if found is None:
                row.append(Cell(text.NONE))
                continue
            digits = text.decimals(found.p50_ms)
            faster = text.short_speedup(found.speedup) if brief else text.speedup(found.speedup)
            row.append(Cell(f"{found.p50_ms:.{digits}f}{doubted(found)}", "", faster if position else ""))
        row += [_accuracy_cell(get(model), get(base) if base else None) for get in (shown_clean, shown_robust)]
        rows.append(row)
    return rows


def shown_clean(model: ModelRow) -> Accuracy | None:
    """Return the clean accuracy of the ONNX file if it was measured, else that of the torch model."""
    return model.onnx_clean or (model.card.clean if model.card else None)


def shown_robust(model: ModelRow) -> Accuracy | None:
    """Return the robust accuracy of the ONNX file if it was measured, else that of the torch model."""
    return model.onnx_robust or (model.card.robust if model.card else None)


def _accuracy_cell(accuracy: Accuracy | None, base: Accuracy | None) -> Cell:
    if accuracy is None or not accuracy.total:
        return Cell(text.NONE)
    return Cell(f"{100 * accuracy.value:.1f}", text.accuracy_span(accuracy), text.points(accuracy, base))


def _with_change(cell: Cell) -> str:
    return cell.plain + (f" ({cell.change})" if cell.change else "")


def headline_table(run: RunReport) -> FirstThatFits:
    """Return the headline table for a terminal, with Markdown lines so that it can be pasted.

    Where it does not fit, intervals are left out first, then sizes, and names are folded.
    """
    if is_wide(run):
        wide = (_wide_table(run, *how) for how in ((False, 3, None), (True, 2, None), (True, 2, FOLDED)))
        narrow = (_wide_table(run, True, details, FOLDED) for details in (1, 0))
        return FirstThatFits(*wide, *narrow, below=caption(run))
    return FirstThatFits(*(_pair_table(run, intervals) for intervals in (2, 1, 0)), below=caption(run))


def _pair_table(run: RunReport, intervals: int) -> Table:
    """Return a table with a line for each figure, and all intervals (2), those of the values (1) or none (0)."""
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for model in run.models:
        table.add_column(escape(model.label), justify="right")
    pair = len(run.models) == SIDE_BY_SIDE
    if pair:
        table.add_column("change", justify="right")
    for line in headline_lines(run):
        figures = [cell.plain if intervals else cell.value for cell in line.cells]
        change = line.cells[-1].change
        if intervals < 2:
            change = text.without_interval(change)
        table.add_row(line.short, *figures, *([change] if pair else []))
    return table


def _wide_table(run: RunReport, brief: bool, details: int, widest_name: int | None) -> Table:
    """Return a table with a line for each model.

    Args:
        run: the report.
        brief: as in `wide_rows`.
        details: whether all intervals are shown (3), that of robust accuracy (2), none (1), or none and no size (0).
        widest_name: columns to which names are folded, or None.
    """
    table = Table(box=box.MARKDOWN)
    heads, rows = wide_heads(run, brief), wide_rows(run, brief)
    kept = [i for i, head in enumerate(heads) if details or head not in ("MACs", "file")]
    for i in kept:
        name = {"max_width": widest_name} if i == 0 else {"no_wrap": True}
        table.add_column(heads[i], justify="right" if i else "left", overflow="fold", **name)
    for row in rows:
        *others, clean, robust = row
        shown = [*map(_with_change, others), clean.plain, robust.plain] if details == 3 else []
        shown = shown or [
            *(f"{cell.value} {cell.change}".strip() for cell in others),
            clean.value,
            robust.plain if details == 2 else robust.value,
        ]
        table.add_row(*(escape(shown[i]) for i in kept))
    return table


def _plain_cells(line: Line, pair: bool) -> list[str]:
    return [cell.plain for cell in line.cells] + ([line.cells[-1].change] if pair else [])


def headline_cells(run: RunReport) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the lines of the headline table as text, with all intervals."""
    if is_wide(run):
        return wide_heads(run), [[_with_change(cell) for cell in row] for row in wide_rows(run)]
    pair = len(run.models) == SIDE_BY_SIDE
    heads = ["", *(m.label for m in run.models), *(["change"] if pair else [])]
    return heads, [[line.short, *_plain_cells(line, pair)] for line in headline_lines(run)]


def headline_markdown(run: RunReport) -> str:
    """Return the headline table as Markdown."""
    heads, body = headline_cells(run)
    lines = [_row([_cell_text(head) for head in heads]), _row(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_row([_cell_text(cell) for cell in cells]) for cells in body]
    return "\n".join(lines) + f"\n\n{caption(run)}\n"


def _cell_text(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
