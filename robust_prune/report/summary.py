"""Summary of a run in sentences, and the key figures at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

from ..catalogue import ALLOCATIONS, CRITERIA
from ..report import text
from .table import find_latency, latency_keys, shown_robust
from .types import ModelRow, RunReport


@dataclass(frozen=True)
class Tile:
    """A key figure: its name, its value and its comparison with the first model."""

    name: str
    value: str
    detail: str


def tiles(run: RunReport) -> list[Tile]:
    """Return key figures of the second model relative to the first: MACs, parameters, speed and robust accuracy."""
    if len(run.models) < 2:
        return []
    before, after = run.models[0], run.models[1]
    found = [
        Tile("Compute", text.relative(after.macs, before.macs), _from_to(before.macs, after.macs) + " MACs"),
        Tile("Parameters", text.relative(after.params, before.params), _from_to(before.params, after.params)),
    ]
    keys = latency_keys(run)
    row = find_latency(after, keys[0]) if keys else None
    if row and row.speedup:
        faster = "no difference" if row.speedup.verdict == "no difference" else f"{row.speedup.value:.2f}{text.TIMES}"
        detail = f"95 % interval {row.speedup.low:.2f} to {row.speedup.high:.2f}, batch {row.batch}"
        found.append(Tile("Speed", faster, detail))
    if before.card and after.card:
        change = text.points(after.card.robust, before.card.robust)
        detail = f"{before.label}: {text.percent(before.card.robust.value)}; {change}"
        found.append(Tile("Robust accuracy", text.percent(after.card.robust.value), detail))
    return [tile for tile in found if tile.value]


def _from_to(before: int, after: int) -> str:
    return f"{text.quantity(before)} \u2192 {text.quantity(after)}"


def summary(run: RunReport) -> list[str]:
    """Return sentences that compare the first two models, and one sentence for each further model."""
    return [*of_first_two(run), *of_others(run)]


def of_first_two(run: RunReport) -> list[str]:
    """Return sentences that compare the first two models, or one on a model without another."""
    if len(run.models) < 2:
        return [_alone(run.models[0])] if run.models and run.models[0].card else []
    before, after = run.models[0], run.models[1]
    found = [_size(before, after), _speed(run, before, after), _accuracy(before, after)]
    return [sentence for sentence in found if sentence]


def of_others(run: RunReport) -> list[str]:
    """Return a sentence for each model after the first two."""
    return [sentence for sentence in (_further(run, model) for model in run.models[2:]) if sentence]


def _alone(model: ModelRow) -> str:
    card = model.card
    if card is None:
        return ""
    return (
        f"The {model.label} model classifies {text.percent(card.clean.value)} of {card.clean.total:,} {card.split} "
        f"images correctly, and {text.percent(card.robust.value)} under attack."
    )


def _size(before: ModelRow, after: ModelRow) -> str:
    macs, params = 1 - after.macs / max(before.macs, 1), 1 - after.params / max(before.params, 1)
    return (
        f"The {after.label} model needs {text.percent(macs)} fewer multiply-accumulates than the {before.label} one "
        f"and has {text.percent(params)} fewer parameters."
        if macs > 0 and params > 0
        else ""
    )


def _speed(run: RunReport, before: ModelRow, after: ModelRow) -> str:
    keys = latency_keys(run)
    row = find_latency(after, keys[0]) if keys else None
    if row is None or row.speedup is None:
        return ""
    threads = f"{row.threads} thread{'s' if row.threads != 1 else ''}" if row.threads else "ONNX Runtime's own threads"
    where = f"at batch {row.batch} on {threads} of this machine"
    if row.speedup.verdict == "no difference":
        return f"Its latency {where} cannot be told apart from the {before.label} model's."
    doubt = f"; in doubt, since {' and '.join(row.doubts)}: measure it again" if row.doubts else ""
    return (
        f"It is {row.speedup.value:.2f} times as fast {where} "
        f"(95 % interval {row.speedup.low:.2f} to {row.speedup.high:.2f}{doubt})."
    )


def _further(run: RunReport, model: ModelRow) -> str:
    """Return a sentence on a model after the first two, by its own accuracy: another precision or another run."""
    keys = latency_keys(run)
    row = find_latency(model, keys[0]) if keys else None
    robust = shown_robust(model)
    if row is None or row.speedup is None or robust is None:
        return ""
    first = run.models[0].label
    speed = (
        f"cannot be told apart in latency from the {first} one"
        if row.speedup.verdict == "no difference"
        else f"is {row.speedup.value:.2f} times as fast as the {first} one{' (in doubt)' if row.doubts else ''}"
    )
    return (
        f"The {model.label} file {speed} at batch {row.batch} and classifies {text.percent(robust.value)} of the "
        "attacked images correctly."
    )


def _accuracy(before: ModelRow, after: ModelRow) -> str:
    if before.card is None or after.card is None:
        return ""
    old, new = before.card, after.card
    return (
        f"It classifies {text.percent(new.clean.value)} of {new.clean.total:,} {new.split} images correctly "
        f"({before.label}: {text.percent(old.clean.value)}), and {text.percent(new.robust.value)} under attack "
        f"({before.label}: {text.percent(old.robust.value)})."
    )


def warnings(run: RunReport) -> list[str]:
    """Return all warnings, with the models' labels: flags of cards, noisy latencies, failed parity, missed budget."""
    flagged: dict[str, list[str]] = {}
    for model in run.models:
        for flag in model.card.flags if model.card else ():
            flagged.setdefault(flag, []).append(model.label)
    found = [f"{', '.join(labels)}: {flag}" for flag, labels in flagged.items()]
    for model in run.models:
        if model.onnx and not model.onnx.parity.passed:
            found.append(f"{model.label}: the ONNX file failed its parity gate.")
    doubted: dict[str, list[str]] = {}
    for model in run.models:
        for doubt in dict.fromkeys(doubt for row in model.latency for doubt in row.doubts):
            doubted.setdefault(doubt, []).append(model.label)
    found += [
        f"{', '.join(labels)}: latency is in doubt, since {doubt}; measure it again."
        for doubt, labels in doubted.items()
    ]
    if run.plan and run.plan.note:
        found.append(f"Budget: {run.plan.note}")
    return found


REPAIRS = {
    "least_squares": " and the least-squares repair of the layers behind it",
    "batchnorm": " and a re-estimation of batch-norm",
}


def after_the_cut(run: RunReport) -> str:
    """Return a sentence with the accuracy after the cut and before fine-tuning; empty without either."""
    start = run.start
    if start is None or run.plan is None:
        return ""
    section = run.recipe.get("pruning")
    section = section if isinstance(section, dict) else {}
    repair = REPAIRS.get(str(section.get("repair")), "")
    which = "last cut" if section.get("cuts", 1) != 1 else "cut"
    return (
        f"Right after the {which}{repair}, before the fine-tuning (epoch 0), the model classified "
        f"{text.percent(start.clean)} of {start.images:,} held-out training images correctly, and "
        f"{text.percent(start.robust)} under PGD-{start.steps}."
    )


UNITS = {"macs": "the MACs", "params": "the parameters", "channels": "the channels", "latency": "the latency"}


def how_cut(run: RunReport) -> str:
    """Return sentences on the target of the cut and how channels were selected; empty without a plan."""
    plan = run.plan
    if plan is None:
        return ""
    rule = f"{ALLOCATIONS.choices[plan.allocation]}." if plan.allocation in ALLOCATIONS.choices else ""
    rule = rule or f"The share of each group was set by the allocation {plan.allocation}."
    aligned = f" Widths are multiples of {plan.round_to} where the budget allows." if plan.round_to > 1 else ""
    target = f"The target was to remove {text.percent(plan.ratio, 0)} of {UNITS.get(plan.metric, plan.metric)}."
    score = CRITERIA.choices.get(plan.criterion, plan.criterion)
    ranking = f" Within a group, channels were ranked by {score[:1].lower()}{score[1:]}."
    return f"{target} {rule}{ranking}{aligned}"
