"""Compare ScratchBatchNorm with a float64 NumPy oracle and with nn.BatchNorm; write one page.

The oracle is the one the tests use: the formulas of the paper with gradients derived by hand.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: end at once, in silence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scratchbn import ScratchBatchNorm, use_backend
from scratchbn._command import Parser, guarded
from scratchbn._writing import write_text
from scratchbn.backends import BACKENDS
from scratchbn.defects import DEFECTS, Finding, survey
from scratchbn.parity import (
    Case,
    Report,
    backends_at_hand,
    compare,
    render,
    run_grid,
    standard_grid,
    where,
)
from scratchbn.parity.oracle_layer import OracleLayer
from scratchbn.parity.report import joined

import mxnet as mx
import numpy as np
from matplotlib.figure import Figure
from mxnet.gluon import nn
from tqdm import tqdm

from models.lenet import lenet


@dataclass(frozen=True)
class Net:
    """A net to compare: how it is built from a norm layer, its data, and how to compare it."""

    name: str
    build: Callable[[Any], Any]
    shape: tuple[int, ...]
    dtype: str = "float64"
    steps: int = 3
    reference: str = "built-in"
    tolerance: float | None = None

    def compare(self, backends: Sequence[str]) -> Report:
        """Compare the net with ours to the one with the reference, on each backend."""
        return joined(map(self._compare, backends))

    def _compare(self, backend: str) -> Report:
        reference = nn.BatchNorm if self.reference == "built-in" else OracleLayer
        rng = np.random.default_rng(0)
        data = [rng.normal(size=self.shape).astype(self.dtype) for _ in range(self.steps)]
        with mx.name.NameManager():
            one, two = self.build(ScratchBatchNorm), self.build(reference)
        with use_backend(backend):
            return compare(
                one,
                two,
                data,
                steps=self.steps,
                dtype=self.dtype,
                rtol=self.tolerance,
                atol=self.tolerance,
                # A net cannot be traced through the oracle, which is NumPy.
                modes=("eager", "hybrid") if self.reference == "built-in" else ("eager",),
            )


def nets(full: bool) -> list[Net]:
    """Return the nets to compare; the GluonCV ones only where gluoncv is installed."""
    mnist, cifar, image = (8, 1, 28, 28), (4, 3, 32, 32), (4, 3, 96, 96)
    found = [
        Net("LeNet", lenet, mnist),
        Net("LeNet, against the oracle", lenet, mnist, reference="oracle"),
        # Of one step: a float32 net is chaotic, and twice as many digits would not be enough.
        Net("LeNet, float32", lenet, mnist, dtype="float32", steps=1, tolerance=1e-4),
    ]
    if importlib.util.find_spec("gluoncv") is None:
        return found

    def of(name: str) -> Callable[[Any], Any]:
        from gluoncv.model_zoo import get_model

        return lambda norm_layer: get_model(name, norm_layer=norm_layer)

    resnet20 = "cifar_resnet20_v1"
    found.append(Net(resnet20, of(resnet20), cifar))
    if full:
        found += [
            Net(f"{resnet20}, against the oracle", of(resnet20), cifar, reference="oracle"),
            Net("resnet18_v1b", of("resnet18_v1b"), image),
        ]
    # Its 27 norm layers magnify the roundings of float64 to 1e-10 in gradients.
    found.append(Net("mobilenet0.5", of("mobilenet0.5"), image, tolerance=1e-8))
    return found


_ONLY_OURS = [  # options that the built-in does not have
    Case((4, 5, 6, 7), {name: value}, dtype, group)
    for name, value, group in (
        ("momentum", None, "cumulative average"),
        ("unbiased_variance", True, "unbiased variance"),
    )
    for dtype in ("float64", "float32")
]


@dataclass(frozen=True)
class Study:
    """Everything that goes on the page."""

    cases: dict[str, Case]
    oracle: Report
    builtin: Report
    nets: list[tuple[Net, Report, float]]
    findings: list[Finding]
    backends: list[str]

    @property
    def named(self) -> list[tuple[str, Report]]:
        """Every report, and whom or what ours was compared with."""
        of_nets = [(net.name, report) for net, report, _ in self.nets]
        return [("oracle", self.oracle), ("built-in", self.builtin), *of_nets]

    @property
    def compared(self) -> int:
        """How many tensors were compared."""
        return sum(len(report.rows) for _, report in self.named)

    def failures(self) -> Iterator[str]:
        """Yield a line for every failure of ours."""
        for name, report in self.named:
            for row in report.failures:
                numbers = f"{row.absolute:.1e}, allowed {row.allowed:.1e}"
                tensor = " ".join(filter(None, [row.backend, row.case, row.kind, row.tensor]))
                yield f"{name}: {tensor} {numbers}, {row.where}"
            if not report.rows:
                yield f"{name}: {report.verdict}"
        for finding in self.findings:
            yield from finding.surprises(["ours"])


# --- its tables ---------------------------------------------------------------------------------

_KINDS = (("output",), ("input gradient", "parameter gradient"), ("statistic",))
_COLUMNS = ("output", "gradients", "statistics")


def _largest(report: Report) -> list[str]:
    """Return the largest absolute difference by kind of tensor."""
    found = [[row.absolute for row in report.rows if row.kind in kinds] for kinds in _KINDS]
    return [f"{np.max(values):.1e}" if values else "" for values in found]


def _layer_table(study: Study) -> tuple[Any, ...]:
    groups: dict[tuple[str, str], set[str]] = {}
    for name, case in study.cases.items():
        groups.setdefault((case.group, case.dtype), set()).add(name)
    lines = []
    for group, dtype in sorted(groups, key=lambda g: (g[0], -np.dtype(g[1]).itemsize)):
        names = groups[group, dtype]
        for backend in study.backends:
            parts = [
                Report(tuple(r for r in report.rows if r.case in names and r.backend == backend))
                for report in (study.oracle, study.builtin)
            ]
            held = all(bool(part) for part in parts if part.rows)
            numbers = [number for part in parts for number in _largest(part)]
            verdict = "held" if held else "failed"
            lines.append([group, dtype, len(names), backend, *numbers, verdict])
    numbers = [f"{name}, {what}" for name in ("oracle", "built-in") for what in _COLUMNS]
    header = ["about", "dtype", "cases", "backend", *numbers, ""]
    return header, lines, "", ["cases", *numbers]


def _net_table(study: Study) -> tuple[Any, ...]:
    lines = []
    for net, report, seconds in study.nets:
        worst = max(report.rows, key=lambda row: row.excess)
        lines.append(
            [
                net.name,
                "x".join(map(str, net.shape)),
                net.steps,
                len(report.rows),
                *_largest(report),
                f"{worst.tensor}, {worst.backend}, {worst.where}",
                f"{seconds:.0f}",
                "held" if report else "failed",
            ]
        )
    numbers = ["steps", "tensors", *_COLUMNS]
    header = ["net", "data", *numbers, "closest to its tolerance", "seconds", ""]
    return header, lines, "", [*numbers, "seconds"]


# --- its figures --------------------------------------------------------------------------------

_COLORS = {
    "output": "#4c72b0",
    "input gradient": "#dd8452",
    "parameter gradient": "#55a868",
    "statistic": "#8172b3",
}
_TICKS = ["≤$10^{-8}$", "$10^{-6}$", "$10^{-4}$", "1%", "allowed"]
_LIMIT = {"color": "#b3261e", "linestyle": "--", "linewidth": 1}


def _picture(figure: Any, description: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return {"description": description, "png": base64.b64encode(buffer.getvalue()).decode()}


def _distribution(study: Study) -> dict[str, str]:
    figure = Figure(figsize=(12, 5.6))
    axes = figure.subplots(2, 3, sharex=True)
    edges = np.linspace(-8.5, 1, 39)
    for row, (name, report) in zip(axes, study.named):
        for axis, dtype in zip(row, ("float64", "float32", "float16")):
            for kind, color in _COLORS.items():
                rows = [r for r in report.rows if r.kind == kind]
                excess = [r.excess for r in rows if study.cases[r.case].dtype == dtype]
                # Equal tensors, and NaN, have no logarithm: they stand at the ends.
                values = np.log10(np.clip(excess, 10.0**-8.4, 9.9))
                axis.hist(values, edges, histtype="stepfilled", alpha=0.25, color=color)
                axis.hist(values, edges, histtype="step", color=color, label=kind)
            axis.axvline(0, **_LIMIT)
            axis.set_title(f"{dtype}, against the {name}", fontsize=10)
            axis.set_yscale("symlog", linthresh=1)
            axis.set_xticks(range(-8, 2, 2), _TICKS)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("tensors")
    for axis in axes[1]:
        axis.set_xlabel("largest difference / allowed difference")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    return _picture(figure, "Histograms of differences relative to what is allowed")


def _by_depth(study: Study) -> dict[str, str]:
    lines = (len(study.nets) + 2) // 3
    figure = Figure(figsize=(12, 2.6 * lines))
    axes = figure.subplots(lines, 3, squeeze=False).ravel()
    for axis, (net, report, _) in zip(axes, study.nets):
        worst = report.worst(lambda row: (row.kind, row.tensor))
        for kind in ("parameter gradient", "statistic"):
            values = [min(max(worst[k].excess, 1e-8), 10) for k in worst if k[0] == kind]
            places = np.linspace(0, 1, max(len(values), 2))[: len(values)]
            axis.plot(places, values, ".", markersize=4, color=_COLORS[kind], label=kind)
        axis.axhline(1, **_LIMIT)
        axis.set_yscale("log")
        axis.set_ylim(0.5e-8, 10)
        axis.set_title(net.name, fontsize=10)
        axis.set_xticks([0, 1], ["first", "last"])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(study.nets) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("difference / allowed")
    figure.tight_layout()
    return _picture(figure, "Differences by parameter, from the first to the last")


# --- the page -----------------------------------------------------------------------------------


def page(study: Study, command: str, seconds: float) -> str:
    """Return the page."""
    failures = list(study.failures())
    return render.page(
        "parity_report.html",
        Path(__file__).parent,
        title="Parity of ScratchBatchNorm",
        made=f"{where.described({'backends': study.backends, **where.facts()})}; {seconds:.0f} s",
        command=command,
        held=not failures,
        verdict=(
            f"{len(failures):,} of {study.compared:,} tensors are out of tolerance."
            if failures
            else f"Everything held: {study.compared:,} tensors compared."
        ),
        failures=failures[:200],
        layers=_layer_table(study),
        distribution=_distribution(study),
        nets=_net_table(study) if study.nets else None,
        by_depth=_by_depth(study) if study.nets else None,
        findings=study.findings,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program name; by default those of the process.

    Returns
    -------
    int
        0 if everything held, 1 if not.
    """
    parser = Parser(description=__doc__, epilog="Exit status: 0 if everything held, 1 if not.")
    parser.add_argument("--full", action="store_true", help="combine options, more nets; minutes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/parity/report.html"),
        metavar="FILE",
        help="the page (default: runs/parity/report.html)",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        metavar="BACKEND",
        help=f"of {', '.join(BACKENDS)} (default: all that can be had without building)",
    )
    parser.add_argument("--no-nets", dest="nets", action="store_false", help="layers only")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    grid = standard_grid(full=arguments.full)
    with_oracle = [*grid, *_ONLY_OURS]

    def bar(items: Any, what: str, total: int | None = None) -> Any:
        return tqdm(items, desc=what, total=total, unit="case", leave=False, disable=None)

    chosen: Any = {"backends": arguments.backends or backends_at_hand()}
    oracle = run_grid(ScratchBatchNorm, OracleLayer, bar(with_oracle, "layers, oracle"), **chosen)
    builtin = run_grid(ScratchBatchNorm, nn.BatchNorm, bar(grid, "layers, built-in"), **chosen)
    compared = []
    for net in bar(nets(arguments.full) if arguments.nets else [], "nets"):
        start = time.perf_counter()
        report = net.compare(**chosen)
        compared.append((net, report, time.perf_counter() - start))
    with use_backend("auto"):
        findings = list(bar(survey(DEFECTS.values()), "known defects", len(DEFECTS)))
    cases = {case.name: case for case in with_oracle}
    study = Study(cases, oracle, builtin, compared, findings, **chosen)
    given = sys.argv[1:] if argv is None else argv
    command = " ".join(["python scripts/parity_report.py", *given])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, page(study, command, time.perf_counter() - began))
    failures = list(study.failures())
    for line in failures:
        print(line)
    print(f"{'FAILED' if failures else 'held'}: {study.compared} tensors compared; {arguments.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(guarded("parity_report.py", main))
