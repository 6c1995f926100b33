"""Reading of recipes from YAML files, command lines and Python; errors name key, file and line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from . import plain_yaml, radius
from .catalogue import is_reference
from .console import warn
from .errors import UsageError
from .recipe import Recipe, Section, ThreatSection

if TYPE_CHECKING:
    from .attacks.threat import ThreatModel

RECIPE_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")
LONGEST_NAME = 4096
"""Characters of a path, beyond which systems raise an error instead of saying that there is no such file."""
LONGEST_SHOWN = 80
"""Characters of a value in a message."""
RENAMED = {
    "pruning.of": "pruning.metric", "pruning.align": "pruning.round_to", "pruning.steps": "pruning.cuts",
    "pruning.compensation": "pruning.repair", "pruning.compensation_images": "pruning.repair_images",
}  # fmt: skip
"""Keys by their names in 0.1, which recipes of that time may have."""

SomeSection = TypeVar("SomeSection", bound=Section)


def shipped() -> dict[str, Path]:
    """Return the files of the recipes that are shipped with the package, by name."""
    for folder in RECIPE_FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find(name: str) -> Path:
    """Return the file of a recipe, given by its path or by the name of a shipped recipe.

    Raises:
        UsageError: `name` is neither.
    """
    path = Path(name)
    if len(name) < LONGEST_NAME and path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`robust-prune recipes ls` lists the shipped ones."
    raise UsageError(f"recipe {name!r} is neither a file nor a shipped recipe. {hint}")


def read(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        UsageError: it cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path} is not UTF-8 text. Give a YAML file.") from error
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}.") from error


def with_threat_of(recipe: Recipe, known: ThreatModel | None, input_size: Sequence[int] | None = None) -> Recipe:
    """Return the recipe with what its section ``threat`` leaves open filled in from a model.

    Args:
        recipe: recipe whose section names norm, radius, both or neither.
        known: threat model that the model was trained against, if it is known.
        input_size: (channels, height, width) of the images, if it is known; it bounds L2 radii.

    Raises:
        UsageError: the recipe names another norm than the model's, or L2 for a model without one, and no radius, or a
            radius is beyond what the norm admits.
    """
    given = recipe.threat.model_fields_set if "threat" in recipe.model_fields_set else frozenset()
    norm = recipe.threat.norm if "norm" in given or known is None else known.norm
    if "epsilon" in given:
        epsilon = recipe.threat.epsilon
    elif norm == (known.norm if known is not None else "linf"):
        epsilon = known.epsilon if known is not None else recipe.threat.epsilon
    else:
        raise UsageError(
            f"norm {norm} needs a radius of its own, got none. Add --epsilon ({radius.USUAL[norm]} is usual), or set "
            "threat.epsilon."
        )
    check_radii(norm, {"threat.epsilon": (epsilon,), "evaluation.sweep": recipe.evaluation.sweep}, input_size)
    return recipe.model_copy(update={"threat": ThreatSection(norm=norm, epsilon=epsilon)})


def check_radii(norm: str, radii: Mapping[str, Sequence[float]], input_size: Sequence[int] | None = None) -> None:
    """Raise UsageError if one of the radii, by the names of their keys, is beyond what the norm admits.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        radii: radii in units of the [0, 1] pixel range.
        input_size: (channels, height, width) of the images, if it is known.
    """
    for key, values in radii.items():
        for value in values:
            if problem := radius.refusal(norm, value, input_size):
                raise UsageError(f"{key} {problem}")


def load(source: str | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a recipe file or the name of a shipped recipe; None for the defaults.
        overrides: values by dotted key, e.g. ``{"pruning.ratio": 0.3}``; None values are ignored.

    Raises:
        UsageError: the file is not valid YAML, a key is unknown, or a value is out of range; the message names file and
            line.
    """
    path = find(source) if source is not None else None
    text = read(path) if path else ""
    try:
        value = plain_yaml.parse(text) or {}
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML, or no recipe: {error}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping such as 'pruning: {{ratio: 0.5}}', got {type(value).__name__}")
    changes = {_present(key): new for key, new in (overrides or {}).items() if new is not None}
    for section, keys in value.items():
        if isinstance(keys, dict):
            value[section] = {_present(f"{section}.{key}").partition(".")[2]: new for key, new in keys.items()}
    _forget_radius_of_another_norm(value, changes)
    for key, new in changes.items():
        _put(value, key, new)
    return _validate(value, path, text, set(changes))


def check_code(recipe: Recipe, chosen: Collection[str]) -> None:
    """Refuse a recipe that names users' code, which a run would execute, unless the user chose it.

    Args:
        recipe: the recipe.
        chosen: dotted keys that the user has set beside the recipe file, e.g. ``finetune.loss``.

    Raises:
        UsageError: a key that was not chosen names a ``file.py:function``.
    """
    for section in (name for name in type(recipe).model_fields if isinstance(getattr(recipe, name), Section)):
        for key, value in getattr(recipe, section):
            dotted = f"{section}.{key}"
            if dotted not in chosen and section != "data" and isinstance(value, str) and is_reference(value):
                raise UsageError(
                    f"the recipe names code that would run: {dotted} is {_shown(value)}. If you trust it, add "
                    f"--trust-code, or choose it yourself with --set {dotted}=…"
                )


def make_section(kind: type[SomeSection], **values: Any) -> SomeSection:
    """Return a recipe section with the given values, and defaults for the others.

    Raises:
        UsageError: a key is unknown, or a value is out of range.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = next(name for name, field in Recipe.model_fields.items() if field.annotation is kind)
        raise UsageError(_explain(problem, (name, *_location(problem)))) from error


def _forget_radius_of_another_norm(value: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Drop the radius of a recipe file whose norm is overridden alone: a radius means nothing under another norm."""
    threat = value.get("threat")
    norm = changes.get("threat.norm")
    if norm is not None and isinstance(threat, dict) and norm != threat.get("norm", "linf"):
        threat.pop("epsilon", None)


def _present(key: str) -> str:
    """Return the present name of a dotted key, with a note if it had another one in 0.1."""
    if key in RENAMED:
        warn(f"the recipe key {key} is called {RENAMED[key]} now.")
    return RENAMED.get(key, key)


def _put(value: dict[str, Any], dotted: str, new: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        value = value.setdefault(parent, {})
        if not isinstance(value, dict):
            raise UsageError(f"cannot set {dotted}: {parent} is not a section of the recipe")
    value[last] = new


def _validate(value: dict[str, Any], path: Path | None, text: str, overridden: set[str]) -> Recipe:
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        location = _location(problem)
        dotted = ".".join(location)
        given = any(dotted == key or dotted.startswith(f"{key}.") for key in overridden)
        where = "" if given else _where(path, text, location)
        raise UsageError(_explain(problem, location) + where) from error


def _location(problem: Any) -> tuple[str, ...]:
    """The key of a problem; validators of whole sections name the key themselves."""
    return tuple(str(part) for part in (*problem["loc"], *problem.get("ctx", {}).get("key", ())))


def _explain(problem: Any, location: tuple[str, ...]) -> str:
    name, found, bounds = location[-1] if location else "the recipe", _shown(problem["input"]), problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _fields(location[:-1]), n=1)
        name = name[:LONGEST_SHOWN] if name.isprintable() else ascii(name[:LONGEST_SHOWN])
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_fields(location[:-1]))}."
        return f"unknown recipe key {'.'.join((*location[:-1], name))}. {hint}"
    if location == ("pruning", "ratio"):
        return f"ratio must be in (0, 1), got {found}. Try 0.5."
    if problem["type"] == "refused":
        return f"{'.'.join(location)} {problem['msg']}"
    if problem["type"] == "literal_error":
        return f"{'.'.join(location)} must be one of {bounds['expected']}, got {found}"
    if problem["type"] == "value_error":
        return f"{'.'.join(location)} {bounds['error']}, got {found}"
    return f"{'.'.join(location)}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {found}"


def _shown(value: Any) -> str:
    """Return a value as it stands in messages: shortened, and with control characters spelled out."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _fields(location: tuple[str, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _where(path: Path | None, text: str, location: tuple[str, ...]) -> str:
    if path is None:
        return ""
    node: Any = plain_yaml.compose(text)
    line = 1
    for part in location:
        found = [pair for pair in getattr(node, "value", []) if isinstance(pair, tuple) and pair[0].value == part]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return f" ({path}:{line})"
