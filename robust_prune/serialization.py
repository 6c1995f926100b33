"""Conversion of dataclasses to and from JSON values, by pydantic."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(value: Any) -> Any:
    """Return the plain JSON value (dicts, lists, strings, numbers) of a dataclass instance."""
    return _adapter(cast(Hashable, type(value))).dump_python(value, mode="json")


def from_json(kind: type[T], value: Any) -> T:
    """Return the instance of `kind` with the JSON value `value`; missing fields have their defaults.

    Raises:
        ValueError: `value` is not of this kind; the message names the first wrong field.
    """
    try:
        found: T = _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field or kind.__name__}: {first['msg']}") from error
    return found
