"""The table of our own translations, by the operator's name in MXNet."""

from __future__ import annotations

from collections.abc import Callable

from .._emitter import Emitter

# Takes a node, writes ONNX, and returns the name of its output.
Translation = Callable[[Emitter], str]

TRANSLATIONS: dict[str, Translation] = {}


def translates(*ops: str) -> Callable[[Translation], Translation]:
    """Enter a translation into the table."""

    def enter(translation: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(ops, translation))
        return translation

    return enter
