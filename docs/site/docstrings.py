"""Docstrings are written in reStructuredText, the site in Markdown."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(class|data|func|math|meth|mod):`~?([^`]+)`")
FORMULA = re.compile(r"^( *)\.\. math:: (.+(?:\n\1 +\S.*)*)", re.MULTILINE)
LITERAL = re.compile(r"::\n\n((?: +\S.*\n?|\n)+)")
# What looks like Python and is none would be printed otherwise than it was written.
TYPES = re.compile(r"\bshape \(|^ *\w+Error(?:, \w+Error)+$", re.MULTILINE)
TYPED = re.compile(r"^( *[\w*, ]+ : )(.+, .+)$", re.MULTILINE)
RULE = re.compile(r"^ *=+(?: +=+)+$")


class ToMarkdown(griffe.Extension):
    """Rewrite the docstrings of a package before their sections are read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Add the names that the package imports when they are asked for, then rewrite."""
        for name, room in ast.literal_eval(str(pkg["_ROOMS"].value)).items():
            pkg.set_member(name, griffe.Alias(name, f"{pkg.name}.{room}.{name}"))
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = to_markdown(obj.docstring.value, obj)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)


def to_markdown(text: str, where: griffe.Object) -> str:
    """Return a docstring in Markdown: tables, formulas, literal blocks, references."""
    text = TYPES.sub(lambda m: m[0].replace(" ", "\u00a0"), _tables(text))
    text = TYPED.sub(lambda m: m[1] + re.sub(", (?!default|optional)", ",\u00a0", m[2]), text)
    text = FORMULA.sub(lambda m: f"{m[1]}$${' '.join(m[2].split())}$$", text)
    text = LITERAL.sub(_fenced, text)
    return ROLE.sub(lambda m: _reference(m[1], m[2], where), text)


def _fenced(match: re.Match[str]) -> str:
    block = match[1].rstrip("\n")
    margin = re.match(" *", block.lstrip("\n"))[0][4:]  # type: ignore[index]
    code = textwrap.indent(f"```python\n{textwrap.dedent(block)}\n```", margin)
    return f":\n\n{code}\n\n"


def _reference(role: str, name: str, where: griffe.Object) -> str:
    """Return a formula, or a name with a link to where it is documented."""
    if role == "math":
        return f"${name}$"
    shown = f"`{name.rpartition('.')[2]}`" if role in ("class", "meth") else f"`{name}`"
    return f"[{shown}][{_path(name, where)}]"


def _path(name: str, where: griffe.Object) -> str:
    """Return the path of a name that a docstring refers to, from the inside outwards."""
    first, place = name.split(".")[0], where
    while place.parent is not None and first not in place.members:
        place = place.parent
    if first not in place.members:
        return name
    found = place.members[first]
    path = found.target_path if found.is_alias else found.path
    return path + name[len(first) :]


def _tables(text: str) -> str:
    """Rewrite the tables, whose columns are marked by rules of equal signs."""
    lines, done = text.splitlines(), []
    while lines:
        if not RULE.match(lines[0]):
            done.append(lines.pop(0))
            continue
        rules = [i for i, line in enumerate(lines) if line == lines[0]]
        last = rules[2] if len(rules) > 2 and "" not in lines[: rules[2]] else rules[1]
        done += _table(lines[: last + 1])
        lines = lines[last + 1 :]
    return "\n".join(done)


def _table(lines: list[str]) -> list[str]:
    starts = [m.start() for m in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    margin = " " * starts[0]
    rows: list[list[str]] = []
    for line in lines[1:]:
        if RULE.match(line):
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, ends)]
        if cells[0] or not rows:
            rows.append(cells)
        else:  # goes on from the line above
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells)]
    header = rows.pop(0) if RULE.match(lines[2]) else [""] * len(starts)
    body = [header, ["---"] * len(starts), *rows]
    return ["", *(margin + "| " + " | ".join(row) + " |" for row in body), ""]
