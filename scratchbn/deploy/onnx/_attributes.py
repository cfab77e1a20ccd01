"""The attributes of a node, with every default written out.

A symbol file states what its author stated. MXNet's operators fill in the rest by their own
defaults; a translation that reads the file alone would fill in others.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Mapping

import mxnet as mx

_DEFAULT = re.compile(r"default=(.*)$")
_BOOLEANS = {"1": "True", "true": "True", "0": "False", "false": "False"}


def stated(op: str, attrs: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes with all defaults, each in one spelling; what is None is left out.

    >>> stated("LRN", {"nsize": "3"})["knorm"], stated("mean", {"keepdims": "1"})["keepdims"]
    ('2', 'True')
    """
    known = mx.operator.get_operator_arguments(op)
    complete = dict(attrs)
    for name, kind in zip(known.names, known.types):
        default = _DEFAULT.search(kind)
        text = attrs.get(name, default[1].strip("'") if default else None)
        if text is None:
            continue
        complete[name] = _spelled(text, kind)
        if default and complete[name] in ("None", "()", ""):
            del complete[name]
    return complete


def _spelled(text: str, kind: str) -> str:
    if kind.startswith("boolean"):
        return _BOOLEANS.get(text, text)
    if kind.startswith(("Shape", "tuple")) and text != "None":
        value = literal_eval(re.sub(r"(?<=\d)L\b", "", text))
        return str(tuple(value) if isinstance(value, (tuple, list)) else (value,))
    return text


class Attributes:
    """Stated attributes, read by type; None is what was not given and has no default."""

    def __init__(self, op: str, attrs: Mapping[str, str]) -> None:
        self.texts = stated(op, attrs)

    def text(self, name: str) -> str | None:
        """Return a word."""
        return self.texts.get(name)

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        return self.texts.get(name) == "True"

    def integer(self, name: str) -> int:
        """Return an integer that has a default or is required."""
        return int(self.texts[name])

    def number(self, name: str) -> float:
        """Return a number that has a default or is required."""
        return float(self.texts[name])

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return a shape or a list of axes."""
        text = self.texts.get(name)
        return None if text is None else tuple(literal_eval(text))
