"""Measure the defects of MXNet's batch norm and ours beside it, as a Markdown table.

The cases are those of ``tests/defect_cases.py``; they run on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "builtin-defects.md"
BEGIN, END = "<!-- defects: begin -->", "<!-- defects: end -->"
THREADS = "https://github.com/apache/mxnet/issues/"
COLUMNS = ("symptom", "thread", "the built-in", "ours", "command")


def load_cases() -> Any:
    """Import the cases, which are part of the test suite."""
    for folder in (REPOSITORY, REPOSITORY / "tests"):
        sys.path.insert(0, str(folder))
    return importlib.import_module("defect_cases")


def both_modes(texts: dict[str, str]) -> str:
    """Say what was seen once if the modes agree, and by mode if they do not."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "<br>".join(f"{mode}: {text}" for mode, text in texts.items())


def as_row(cells: Sequence[str]) -> str:
    """Write a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def measure(cases: Any, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Measure cases with both layers in both modes.

    Parameters
    ----------
    cases : module
        ``tests/defect_cases.py``.
    keys : sequence of str
        Which of its cases.

    Returns
    -------
    rows : list of str
        The table, in Markdown.
    surprises : list of str
        What is not as the page says: the built-in right, or ours wrong.
    """
    rows, surprises = [as_row(COLUMNS), as_row(["---"] * len(COLUMNS))], []
    device = importlib.import_module("mxnet").cpu()
    with tqdm(total=len(keys) * len(cases.LAYERS) * len(cases.MODES), unit="case") as bar:
        for key in keys:
            case, seen = cases.DEFECTS[key], {}
            for norm in cases.LAYERS:
                texts = {}
                for mode in cases.MODES:
                    bar.set_description(f"{key}, {norm}, {mode}")
                    outcome = case.outcome(norm, mode, device)
                    texts[mode] = outcome.text
                    if outcome.sound != (norm == "ours"):
                        surprises.append(f"{key}, {norm}, {mode}: {outcome.text}")
                    bar.update()
                seen[norm] = both_modes(texts)
            links = ", ".join(f"[#{thread}]({THREADS}{thread})" for thread in case.threads)
            command = f"`pytest tests/test_defects.py -k {key}`"
            rows.append(as_row([case.symptom, links or "-", *seen.values(), command]))
    return rows, surprises


def replace_table(page: Path, table: str) -> None:
    """Put a table between the two markers of a page, all of it or nothing.

    Parameters
    ----------
    page : Path
        A Markdown file with one line ``BEGIN`` and, after it, one line ``END``.
    table : str
        What comes between them.

    Raises
    ------
    ValueError
        If the page does not have the two markers once each, in this order.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} must have one {BEGIN!r} and one {END!r} after it")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    handle, name = tempfile.mkstemp(dir=page.parent, prefix=f".{page.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{before}{BEGIN}\n{table}\n{after}")
        Path(name).chmod(page.stat().st_mode)
        os.replace(name, page)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; default: this process's.

    Returns
    -------
    int
        0 if every case came out as the page says, else 1.
    """
    cases = load_cases()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(REPOSITORY)}")
    what.add_argument("--only", nargs="+", metavar="CASE", choices=list(cases.DEFECTS))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "The 0-th input to HybridBlock is not used")
    rows, surprises = measure(cases, options.only or list(cases.DEFECTS))
    if options.write:
        replace_table(PAGE, "\n".join(rows))
    else:
        print("\n".join(rows))
    for surprise in surprises:
        print(f"not as expected: {surprise}", file=sys.stderr)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
