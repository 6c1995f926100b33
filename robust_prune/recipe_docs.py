"""What can be written into a recipe, read from its schema: for the documentation and for ``recipes explain``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .catalogue import Catalogue
from .errors import UsageError
from .recipe import Recipe
from .suggest import question

_KINDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping",
}  # fmt: skip
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Choice:
    """One of the values that a key takes; `help` is empty where the key's own text explains them."""

    name: str
    help: str = ""


@dataclass(frozen=True)
class KeyDoc:
    """One key of a recipe.

    Attributes:
        name: with its section, e.g. ``pruning.ratio``.
        kind: its type and limits in words, e.g. ``number, above 0 and below 1``.
        default: as YAML would have it.
        choices: the values that it takes, if they can be listed.
        text: what it means.
    """

    name: str
    kind: str
    default: str
    choices: tuple[Choice, ...]
    text: str

    @property
    def short_name(self) -> str:
        """Without its section."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class SectionDoc:
    """A section of a recipe; the keys that stand in none form a section without a name."""

    name: str
    text: str
    keys: tuple[KeyDoc, ...]


def describe() -> tuple[SectionDoc, ...]:
    """All sections of a recipe in their order, those keys first that stand in none."""
    return tuple(_sections())


def find(name: str) -> SectionDoc | KeyDoc:
    """The section or key called `name`, such as ``pruning`` or ``pruning.ratio``.

    Raises:
        UsageError: there is neither; the message names the nearest.
    """
    sections = describe()
    known: dict[str, SectionDoc | KeyDoc] = {section.name: section for section in sections if section.name}
    known |= {key.name: key for section in sections for key in section.keys}
    if name in known:
        return known[name]
    # Without the sections: they are long, so that keys which share one would all look alike.
    section, _, key = name.rpartition(".")
    nearest = difflib.get_close_matches(key, [other.rpartition(".")[2] for other in known], n=1)
    near = [other for other in known if other.rpartition(".")[2] in nearest]
    here = [other for other in near if other.startswith(f"{section}.")]
    hint = question(here or near) or " `robust-prune recipes explain` lists all keys."
    raise UsageError(f"unknown recipe key {name!r}.{hint}")


def default(key: str, missing: str = "none") -> str:
    """Return the default of a key such as ``pruning.ratio`` as help shows it; `missing` stands for null and empty."""
    section, _, name = key.rpartition(".")
    value = Recipe().model_dump(mode="json")
    found = value[section][name] if section else value[name]
    return missing if found is None or found == [] else _as_yaml(found)


def to_markdown(sections: tuple[SectionDoc, ...]) -> str:
    """The sections as MyST Markdown, one ``confval`` a key, to which other pages can refer by its name."""
    return "\n".join(line for section in sections for line in _section_lines(section))


def _sections() -> Iterator[SectionDoc]:
    schema, defaults = Recipe.model_json_schema(), Recipe().model_dump(mode="json")
    fields = Recipe.model_fields
    loose = [name for name in fields if "$ref" not in schema["properties"][name]]
    keys = (_key(name, schema["properties"][name], defaults[name], fields[name].metadata) for name in loose)
    yield SectionDoc("", "Keys that belong to no section.", tuple(keys))
    for name in fields:
        if name in loose:
            continue
        part = schema["properties"][name]
        kind: Any = fields[name].annotation
        section = schema["$defs"][kind.__name__]
        yield SectionDoc(
            name,
            _one_line(part.get("description") or section["description"]),
            tuple(
                _key(f"{name}.{key}", section["properties"][key], defaults[name][key], field.metadata)
                for key, field in kind.model_fields.items()
            ),
        )


def _key(name: str, schema: Mapping[str, Any], default: Any, metadata: list[Any]) -> KeyDoc:
    catalogue = next((item for item in metadata if isinstance(item, Catalogue)), None)
    variants = [part for part in schema.get("anyOf", [schema]) if part["type"] != "null"]
    kind = " or ".join(map(_kind, variants)) if catalogue is None else "name, or file.py:function"
    kind += ", or null" if "anyOf" in schema else ""
    if catalogue is not None:
        choices = [Choice(*item) for item in catalogue.choices.items()]
        choices.append(Choice("file.py:function", "A function of your own"))
    else:
        inner = variants[0].get("items", variants[0])
        choices = [Choice(value) for value in inner.get("enum", ())]
    return KeyDoc(name, kind, _as_yaml(default), tuple(choices), _one_line(schema["description"]))


def _kind(schema: Mapping[str, Any]) -> str:
    """Type and limits in words, from a JSON schema."""
    if schema["type"] == "array":
        items = _kind(schema["items"]).replace(", ", ", each ", 1)
        noun, comma, rest = items.partition(",")
        return f"list of {noun}s{comma}{rest}" + (", not empty" if schema.get("minItems") else "")
    if "enum" in schema:
        return "choice"
    limits = " and ".join(f"{word} {schema[key]:g}" for key, word in _LIMITS.items() if key in schema)
    return _KINDS[schema["type"]] + (f", {limits}" if limits else "")


def _as_yaml(value: Any) -> str:
    if isinstance(value, float) and (fraction := Fraction(value).limit_denominator(255)).denominator == 255:
        return str(fraction)  # radii are written as papers write them
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _section_lines(section: SectionDoc) -> Iterator[str]:
    yield from (f"## `{section.name}`" if section.name else "## Top level", "", _escaped(section.text), "")
    for key in section.keys:
        yield from (f"```{{confval}} {key.name}", "", _escaped(key.text), "")
        if any(choice.help for choice in key.choices):
            yield from (f"- `{choice.name}`: {_escaped(choice.help)}" for choice in key.choices)
            yield ""
        elif key.choices:
            yield from (f"Choices: {', '.join(f'`{choice.name}`' for choice in key.choices)}.", "")
        yield from (f"*Type:* {key.kind}. *Default:* `{key.default}`.", "```", "")


def _escaped(text: str) -> str:
    """Placeholders such as ``<name>`` would be taken for HTML."""
    return text.replace("<", r"\<")
