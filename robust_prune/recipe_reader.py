"""Reading of recipes from YAML files, command lines and Python; errors name key, file and line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError

from .errors import UsageError
from .recipe import Recipe, Section, ThreatSection

if TYPE_CHECKING:
    from .attacks.threat import ThreatModel

RECIPE_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")
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
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`robust-prune recipes ls` lists the shipped ones."
    raise UsageError(f"recipe {name!r} is neither a file nor a shipped recipe. {hint}")


def with_threat_of(recipe: Recipe, known: ThreatModel | None) -> Recipe:
    """Return the recipe with what its section ``threat`` leaves open filled in from a model.

    Args:
        recipe: recipe whose section names norm, radius, both or neither.
        known: threat model that the model was trained against, if it is known.

    Raises:
        UsageError: the recipe names another norm than the model's, or L2 for a model without one, and no radius.
    """
    given = recipe.threat.model_fields_set if "threat" in recipe.model_fields_set else frozenset()
    norm = recipe.threat.norm if "norm" in given or known is None else known.norm
    if "epsilon" in given:
        epsilon = recipe.threat.epsilon
    elif norm == (known.norm if known is not None else "linf"):
        epsilon = known.epsilon if known is not None else recipe.threat.epsilon
    else:
        usual = {"l2": "0.5", "linf": "8/255"}[norm]
        raise UsageError(f"norm {norm} needs a radius of its own, got none. Add --epsilon ({usual} is usual).")
    return recipe.model_copy(update={"threat": ThreatSection(norm=norm, epsilon=epsilon)})


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
    text = path.read_text(encoding="utf-8") if path else ""
    try:
        value = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping such as 'pruning: {{ratio: 0.5}}', got {type(value).__name__}")
    for key, new in (overrides or {}).items():
        if new is not None:
            _put(value, key, new)
    return _validate(value, path, text, set(overrides or {}))


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
        raise UsageError(_explain(problem, (name, *(str(part) for part in problem["loc"])))) from error


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
        location = tuple(str(part) for part in problem["loc"])
        dotted = ".".join(location)
        given = any(dotted == key or dotted.startswith(f"{key}.") for key in overridden)
        where = "" if given else _where(path, text, location)
        raise UsageError(_explain(problem, location) + where) from error


def _explain(problem: Any, location: tuple[str, ...]) -> str:
    name, found, bounds = location[-1], problem["input"], problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _fields(location[:-1]), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_fields(location[:-1]))}."
        return f"unknown recipe key {'.'.join(location)}. {hint}"
    if location == ("pruning", "ratio"):
        return f"ratio must be in (0, 1), got {found}. Try 0.5."
    if problem["type"] == "literal_error":
        return f"{'.'.join(location)} must be one of {bounds['expected']}, got {found!r}"
    if problem["type"] == "value_error":
        return f"{'.'.join(location)} {bounds['error']}, got {found!r}"
    return f"{'.'.join(location)}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {found!r}"


def _fields(location: tuple[str, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _where(path: Path | None, text: str, location: tuple[str, ...]) -> str:
    if path is None:
        return ""
    node: Any = yaml.compose(text)
    line = 1
    for part in location:
        found = [pair for pair in getattr(node, "value", []) if isinstance(pair, tuple) and pair[0].value == part]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return f" ({path}:{line})"
