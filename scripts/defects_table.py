"""Measure the defects of MXNet's batch norm and ours beside it, as a Markdown table.

The measurements are those of ``scratchbn.defects``; they run on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scratchbn._command import Parser
from scratchbn._text import table
from scratchbn._writing import write_text
from scratchbn.defects import DEFECTS, LAYERS, Finding, survey

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "builtin-defects.md"
BEGIN, END = "<!-- defects: begin -->", "<!-- defects: end -->"
THREADS = "https://github.com/apache/mxnet/issues/"
COLUMNS = ("symptom", "thread", "the built-in", "ours", "command")


def as_row(finding: Finding) -> list[str]:
    """Return the cells of a defect."""
    defect = finding.defect
    return [
        defect.symptom,
        ", ".join(f"[#{thread}]({THREADS}{thread})" for thread in defect.threads) or "-",
        *("<br>".join(finding.texts(norm)) for norm in LAYERS),
        f"`pytest tests/parity/test_defects.py -k {defect.key}`",
    ]


def replace_table(page: Path, text: str) -> None:
    """Put a table between the two markers of a page, all of it or nothing.

    Parameters
    ----------
    page : Path
        A Markdown file with one line ``BEGIN`` and, after it, one line ``END``.
    text : str
        What comes between them.

    Raises
    ------
    ValueError
        If the page does not have the two markers once each, in this order.
    """
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{page} must have one {BEGIN!r} and one {END!r} after it")
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    write_text(page, f"{before}{BEGIN}\n{text}\n{after}")


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
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(REPOSITORY)}")
    what.add_argument("--only", nargs="+", metavar="CASE", choices=list(DEFECTS))
    options = parser.parse_args(arguments)
    defects = [DEFECTS[key] for key in options.only or DEFECTS]
    findings = list(tqdm(survey(defects), total=len(defects), unit="case"))
    text = table(COLUMNS, [as_row(finding) for finding in findings], markdown=True)
    if options.write:
        replace_table(PAGE, text)
    else:
        print(text)
    surprises = [surprise for finding in findings for surprise in finding.surprises()]
    for surprise in surprises:
        print(f"not as expected: {surprise}", file=sys.stderr)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
