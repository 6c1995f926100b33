"""YAML as plain values of bounded size: text, numbers, truth values, lists and mappings.

YAML can do more than settings need. An alias that repeats an alias ten times describes 10^n values in n lines, a number
in base 60 with many digits takes minutes to convert, and dates, sets and binary values have no counterpart in JSON.
"""

from __future__ import annotations

from typing import Any

import yaml

from .printable import one_line

LONGEST_TEXT = 200_000
"""Characters of a text; the longest shipped recipe has fewer than 2,000."""
MOST_VALUES, DEEPEST = 10_000, 20
"""Number of values, with those that aliases repeat, and depth of lists and mappings inside each other."""
LONGEST_NUMBER = 40
"""Characters of a number."""
_PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def compose(text: str) -> yaml.Node | None:
    """Return the tree of a YAML text, after checking its size and kinds; None for an empty text.

    Raises:
        ValueError: the text is not valid YAML, or holds too many, too deep or other values; the message says which.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has {len(text):,} characters, and at most {LONGEST_TEXT:,} are read")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    _check(node)
    return node


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: as `compose`, or a number cannot be read.
    """
    compose(text)
    try:
        return yaml.safe_load(text)
    # The constructors of PyYAML raise whatever Python does for an explicit tag that does not fit its value.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(one_line(error)) from error


def _check(root: yaml.Node | None) -> None:
    waiting, values = [(root, 1)] if root is not None else [], 0
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, with those that its aliases repeat")
        if depth > DEEPEST:
            raise ValueError(_too_deep())
        line = node.start_mark.line + 1
        if node.tag not in _PLAIN:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ValueError(f"line {line} holds a value of the kind {kind!r}; quote it if it is a text")
        if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"line {line} holds a number of {len(node.value):,} characters")
        if isinstance(node, yaml.MappingNode):
            names = [(key.tag, str(key.value)) for key, _ in node.value]
            if len(set(names)) < len(names):
                twice = next(name for _, name in names if sum(name == other for _, other in names) > 1)
                raise ValueError(f"line {line} begins a mapping that has the key {twice[:40]!r} twice")
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def _too_deep() -> str:
    return f"its lists and mappings lie more than {DEEPEST} levels inside each other"
