"""Draw the README's picture: the paper's algorithm, the code that is it, and a net that uses it."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scratchbn import functional
from scratchbn._command import Parser, fail
from scratchbn._writing import staged

from matplotlib.figure import Figure

ALGORITHM = (
    r"$\mu = \frac{1}{m}\sum_i x_i$",
    r"$\sigma^2 = \frac{1}{m}\sum_i (x_i - \mu)^2$",
    r"$\hat{x}_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}$",
    r"$y_i = \gamma\,\hat{x}_i + \beta$",
)
NAMES = {"scratch": "scratchbn", "builtin": "nn.BatchNorm"}


def code_lines() -> list[str]:
    """Return the lines of `pure_batch_norm` that are a line of Algorithm 1."""
    lines = inspect.getsource(functional.pure_batch_norm).splitlines()
    found = [line.split("#")[0].strip() for line in lines if "# line " in line]
    return [line.replace("axis=over, keepdims=True", "...") for line in found]


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Draw the picture of a run whose ``metrics.json`` is given."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    words, curves = figure.subplots(1, 2, width_ratios=[1.75, 1])
    words.set_axis_off()
    words.set(xlim=(0, 1), ylim=(0, 1))
    words.text(0.0, 0.96, "the paper, Algorithm 1", weight="bold", va="center")
    words.text(0.36, 0.96, "scratchbn/functional.py", weight="bold", va="center")
    for i, (formula, line) in enumerate(zip(ALGORITHM, code_lines())):
        y = 0.78 - 0.23 * i
        words.text(0.0, y, formula, size=15, va="center")
        words.text(0.36, y, line, size=10, family="monospace", va="center")
    for norm, style, marker in (("builtin", "--", "s"), ("scratch", "-", "o")):
        epochs = [epoch for epoch in metrics["epochs"] if epoch["norm"] == norm]
        numbers, accuracies = ([epoch[key] for epoch in epochs] for key in ("epoch", "test_acc"))
        color, fill = ("C1", "none") if norm == "builtin" else ("C0", "full")
        curves.plot(
            numbers,
            accuracies,
            style,
            marker=marker,
            color=color,
            fillstyle=fill,
            label=NAMES[norm],
        )
    curves.set(xlabel="epoch", title="LeNet on MNIST, test accuracy")
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right")
    with staged(path) as file:
        figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser: argparse.ArgumentParser = Parser(prog="readme_picture.py", description=__doc__)
    parser.add_argument("metrics", type=Path, help="metrics.json of train_lenet.py --epochs 10")
    parser.add_argument("--out", type=Path, default=Path("docs/readme.png"), metavar="FILE")
    options = parser.parse_args(argv)
    try:
        draw(json.loads(options.metrics.read_text("utf-8")), options.out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return fail(parser.prog, 2, f"{options.metrics}: {type(error).__name__}: {error}")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
