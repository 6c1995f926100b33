"""Values as JSON and back, by their types: pydantic does both."""

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
    """The plain JSON value (dicts, lists, strings, numbers) of an instance of a dataclass."""
    return _adapter(cast(Hashable, type(value))).dump_python(value, mode="json")


def from_json(kind: type[T], value: Any) -> T:
    """The instance of `kind` that `to_json` made `value` of; fields that it lacks take their defaults.

    Raises:
        ValueError: `value` is not of that kind; one line that names the first field that is wrong.
    """
    try:
        found: T = _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field or kind.__name__}: {first['msg']}") from error
    return found
