"""Compare ScratchBatchNorm with a float64 NumPy oracle and with nn.BatchNorm; write one page.

The oracle is the one the tests use: the formulas of the paper with gradients derived by hand.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

import scratchbn  # noqa: E402  (prepares the runtime, so it comes before mxnet)

# isort: split
from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU  # noqa: E402
from scratchbn.parity import Case, Report, compare, run_grid, standard_grid  # noqa: E402

import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import HybridBlock, nn  # noqa: E402
from oracle import OracleBatchNorm  # type: ignore[import-not-found]  # noqa: E402
from tqdm import tqdm  # noqa: E402

from models.lenet import lenet  # noqa: E402

_TIMEOUT = 120  # seconds for one known deviation


# --- the oracle as a layer ----------------------------------------------------------------------


class OracleLayer(HybridBlock):
    """The oracle with the parameters and options of ScratchBatchNorm; always eager.

    Takes and returns arrays of any dtype, computes in float64, rounds once.
    """

    relu = False

    def __init__(
        self,
        axis: int = 1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: str = "zeros",
        in_channels: int = 0,
        unbiased_variance: bool = False,
        prefix: str | None = None,
        params: Any = None,
    ) -> None:
        super().__init__(prefix=prefix, params=params)
        self._kwargs = {
            "axis": axis,
            "momentum": momentum,
            "epsilon": epsilon,
            "center": center,
            "scale": scale,
            "use_global_stats": use_global_stats,
            "unbiased_variance": unbiased_variance,
        }
        trained = {"gamma": ("ones", scale), "beta": (beta_initializer, center)}
        kept = {"running_mean": ("zeros", False), "running_var": ("ones", False)}
        for name, (init, trainable) in {**trained, **kept}.items():
            self._add(name, (in_channels,), init, trainable)
        if momentum is None:
            self._add("num_batches", (1,), "zeros", False)

    def _add(self, name: str, shape: tuple[int, ...], init: str, trainable: bool) -> None:
        parameter = self.params.get(
            name,
            shape=shape,
            init=init,
            grad_req="write" if trainable else "null",
            differentiable=trainable,
            allow_deferred_init=True,
        )
        setattr(self, name, parameter)

    def cast(self, dtype: Any) -> None:
        """Cast the parameters; they are float32 for float16."""
        super().cast("float32" if np.dtype(dtype) == np.float16 else dtype)

    def forward(self, x: Any) -> Any:
        """Normalize a batch."""
        names = ("gamma", "beta", "running_mean", "running_var")
        state = {name: getattr(self, name).data(x.ctx).asnumpy() for name in names}
        batches = 0
        if self._kwargs["momentum"] is None:
            batches = int(self.num_batches.data(x.ctx).asscalar())
        oracle = OracleBatchNorm(**state, **self._kwargs, relu=self.relu, batches=batches)
        training = autograd.is_training()
        # Function mixes gradients up where an input has none, so such inputs stay out.
        trained = [n for n in ("gamma", "beta") if getattr(self, n).grad_req != "null"]
        arrays = [getattr(self, name).data(x.ctx) for name in trained]
        y = _OracleFunction(oracle, training, trained)(x, *arrays)
        if training:
            oracle.train(x.asnumpy())
            self.running_mean.set_data(mx.nd.array(oracle.running_mean, dtype="float64"))
            self.running_var.set_data(mx.nd.array(oracle.running_var, dtype="float64"))
            if self._kwargs["momentum"] is None:
                self.num_batches.set_data(mx.nd.array([oracle.batches]))
        return y


class OracleReLU(OracleLayer):
    """The oracle followed by ``max(y, 0)``."""

    relu = True


class _OracleFunction(autograd.Function):
    def __init__(self, oracle: OracleBatchNorm, training: bool, trained: Sequence[str]) -> None:
        super().__init__()
        copy = replace(oracle)  # whose statistics move without the caller's moving
        self._step = copy.train_step if training else copy.infer_step
        self._trained = trained

    def forward(self, x: Any, *trained: Any) -> Any:
        self._x, self._dtypes = x.asnumpy(), [array.dtype for array in (x, *trained)]
        y = self._step(self._x, np.zeros(x.shape)).y
        return mx.nd.array(y, dtype=x.dtype, ctx=x.ctx)

    def backward(self, dy: Any) -> Any:
        step = self._step(self._x, dy.asnumpy())
        gradients = [step.dx, *(getattr(step, f"d{name}") for name in self._trained)]
        return tuple(
            mx.nd.array(gradient, dtype=dtype, ctx=dy.ctx)
            for gradient, dtype in zip(gradients, self._dtypes)
        )


# --- what is compared ---------------------------------------------------------------------------


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

    def compare(self) -> Report:
        """Compare the net with ours to the one with the reference."""
        reference = nn.BatchNorm if self.reference == "built-in" else OracleLayer
        rng = np.random.default_rng(0)
        data = [rng.normal(size=self.shape).astype(self.dtype) for _ in range(self.steps)]
        with mx.name.NameManager():
            one, two = self.build(ScratchBatchNorm), self.build(reference)
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

    found.append(Net("cifar_resnet20_v1", of("cifar_resnet20_v1"), cifar))
    if full:
        found.append(
            Net(
                "cifar_resnet20_v1, against the oracle",
                of("cifar_resnet20_v1"),
                cifar,
                reference="oracle",
            )
        )
        found.append(Net("resnet18_v1b", of("resnet18_v1b"), image))
    # Its 27 norm layers magnify the roundings of float64 to 1e-10 in gradients.
    found.append(Net("mobilenet0.5", of("mobilenet0.5"), image, tolerance=1e-8))
    return found


_ONLY_OURS = (  # options that the built-in does not have
    Case((4, 5, 6, 7), {"momentum": None}, "float64", "cumulative average"),
    Case((4, 5, 6, 7), {"momentum": None}, "float32", "cumulative average"),
    Case((4, 5, 6, 7), {"unbiased_variance": True}, "float64", "unbiased variance"),
    Case((4, 5, 6, 7), {"unbiased_variance": True}, "float32", "unbiased variance"),
)


@dataclass(frozen=True)
class Deviation:
    """A behaviour in which the built-in is known to differ from the formulas.

    Attributes
    ----------
    title, why : str
        What a user sees, and where it comes from.
    build : callable
        Takes a norm layer class and returns a layer or net.
    shape, dtype, mean, std
        Of the data.
    layers : tuple
        Ours, the built-in and the oracle.
    settings : dict
        For ``compare``.
    """

    title: str
    why: str
    build: Callable[[Any], Any]
    shape: tuple[int, ...]
    dtype: str
    mean: float = 0.0
    std: float = 1.0
    layers: tuple[Any, Any, Any] = (ScratchBatchNorm, nn.BatchNorm, OracleLayer)
    settings: tuple[tuple[str, Any], ...] = ()

    def reports(self) -> dict[str, Report]:
        """Compare ours, then the built-in, with the oracle."""
        rng = np.random.default_rng(0)
        data = rng.normal(self.mean, self.std, self.shape).astype(self.dtype)
        ours, builtin, oracle = self.layers
        settings: dict[str, Any] = {"modes": ("eager",), "steps": 1, **dict(self.settings)}
        # Held to what a float64 momentum gives: strict for the built-in too.
        settings.setdefault("statistics_rtol", 1e-12 if self.dtype == "float64" else 1e-5)
        settings.setdefault("statistics_atol", 0.0)
        return {
            name: compare(self.build(layer), self.build(oracle), data, dtype=self.dtype, **settings)
            for name, layer in (("ours", ours), ("builtin", builtin))
        }


def _after(producer: Callable[[], Any], **options: Any) -> Callable[[Any], Any]:
    def build(layer: Any) -> Any:
        net = nn.HybridSequential()
        net.add(producer(), layer(**options))
        return net

    return build


DEVIATIONS = (
    Deviation(
        "center=False still adds beta",
        "The operator has no such option; the layer only stops training beta. It shows once beta "
        "is not zero, as after loading a file.",
        lambda layer: layer(in_channels=5, center=False, beta_initializer="ones"),
        (4, 5, 6, 6),
        "float64",
    ),
    Deviation(
        "float64 running statistics with a float32 momentum",
        "0.9 becomes 0.899999976 inside the operator, so every step adds an error of 2e-8.",
        lambda layer: layer(in_channels=5),
        (4, 5, 6, 6),
        "float64",
        settings=(("steps", 3),),
    ),
    Deviation(
        "float32 running variance of data with a standard deviation of 1e-5, epsilon 1e-3",
        "The operator returns 1/sqrt(var + epsilon), from which the variance is rebuilt after "
        "epsilon has swallowed it.",
        lambda layer: layer(in_channels=5, momentum=0.0, epsilon=1e-3),
        (8, 5, 6, 6),
        "float32",
        std=1e-5,
    ),
    Deviation(
        "float32 data with a mean of 1e5 and a standard deviation of 1",
        "The sum of 262,144 such numbers in float32 loses the mean, and with it the variance.",
        lambda layer: layer(in_channels=5),
        (64, 5, 64, 64),
        "float32",
        mean=1e5,
        settings=(("atol", 1e-5), ("rtol", 1e-5)),
    ),
    Deviation(
        "Conv1D before batch normalization, 8 channels",
        "oneDNN hands over a blocked layout that the operator's backward cannot take.",
        _after(lambda: nn.Conv1D(8, 3)),
        (4, 3, 12),
        "float32",
        settings=(("rtol", 1e-4), ("atol", 1e-4)),
    ),
    Deviation(
        "Conv3D before batch normalization, 16 channels",
        "As above.",
        _after(lambda: nn.Conv3D(16, 3)),
        (2, 3, 6, 6, 6),
        "float32",
        settings=(("rtol", 1e-4), ("atol", 1e-4)),
    ),
    Deviation(
        "Conv2D before batch normalization of axis 2, 16 channels",
        "As above.",
        _after(lambda: nn.Conv2D(16, 3), axis=2),
        (4, 3, 10, 10),
        "float32",
        settings=(("rtol", 1e-4), ("atol", 1e-4)),
    ),
    Deviation(
        "BatchNormReLU in float64",
        "The fused operator exists for float32, four axes and axis 1 only.",
        lambda layer: layer(in_channels=5),
        (4, 5, 6, 6),
        "float64",
        layers=(ScratchBatchNormReLU, nn.BatchNormReLU, OracleReLU),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a known deviation."""

    deviation: Deviation
    ours: Report | None
    builtin: Report | None
    crash: str = ""


def try_deviation(number: int) -> Outcome:
    """Run a deviation in a process of its own: the built-in may take it down."""
    deviation = DEVIATIONS[number]
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--deviation", str(number)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(deviation, None, None, f"no answer within {_TIMEOUT} s")
    found: dict[str, Report] = {}
    for line in process.stdout.splitlines():
        name, _, text = line.partition(" ")
        if name in ("ours", "builtin"):
            found[name] = Report.from_json(json.loads(text))
    crash = ""
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        crash = f"process ended with status {process.returncode}: {last}"
    return Outcome(deviation, found.get("ours"), found.get("builtin"), crash)


def _print_deviation(number: int) -> int:
    for name, report in DEVIATIONS[number].reports().items():
        print(name, json.dumps(report.to_json()), flush=True)
    return 0


# --- the page -----------------------------------------------------------------------------------

_KINDS = {
    "output": "#4c72b0",
    "input gradient": "#dd8452",
    "parameter gradient": "#55a868",
    "statistic": "#8172b3",
}

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1b1b1f;
       background: #fff; margin: 2.5rem auto; max-width: 72rem; padding: 0 1.5rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem }
p { max-width: 52rem } .quiet { color: #5c5c66; font-size: .9rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th { font-weight: 600; text-align: left; border-bottom: 2px solid #c9c9d1; vertical-align: bottom }
td { border-bottom: 1px solid #e6e6eb; vertical-align: top }
td, th { padding: .3rem .9rem .3rem 0 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.ok { color: #17692a } .fail { color: #b3261e; font-weight: 600 }
.verdict { font-size: 1.15rem; padding: .6rem 1rem; border-left: 5px solid; background: #f6f6f9 }
img { width: 100%; height: auto } code { font-size: .9em; overflow-wrap: anywhere }
"""


_LAYERS_TEXT = """<p>Every case runs eager and hybridized: three training steps with gradient
descent, inference, and a step with <code>use_global_stats</code>. Compared are outputs, gradients
of the data, of gamma and of beta, and running statistics: with the oracle (float64 NumPy, gradients
derived by hand) and with <code>nn.BatchNorm</code>. The numbers are the largest absolute
differences.</p>"""

_TOLERANCE_TEXT = """<p class="quiet">Allowed for outputs and gradients, s being the largest
magnitude in the tensor: 1e-10 (1 + s) in float64, 1e-5 (1 + s) in float32, 5e-3 (1 + s) in
float16. For running statistics: 1e-12 s in float64, 1e-5 s otherwise. Against the built-in 1e-6 s
in float64, as its momentum is a float32 number, and 1e-3 s in float16, as it rebuilds the variance
from a rounded value.</p>"""

_DISTRIBUTION_TEXT = """<p>Each tensor of each step, relative to what is allowed. Tensors that agree
exactly are in the leftmost bar; anything right of the dashed line fails.</p>"""

_NETS_TEXT = """<p>The same net with ours and with the reference, from the same parameters, drawn at
random. Against the built-in eager and hybridized, against the oracle eager.</p>"""

_DEPTH_TEXT = (
    """<p>Gradients and running statistics by parameter, from the first to the last:</p>"""
)

_DEVIATIONS_TEXT = """<p>Known behaviour of <code>nn.BatchNorm</code> in MXNet 1.9.1, kept out of
the tables above. Here both layers are compared with the oracle, each behaviour in a process of its
own. What counts for the verdict is ours.</p>"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]], numbers: Sequence[int]) -> str:
    """Return a table; cells are HTML, those in the columns `numbers` are set to the right."""

    def line(cells: Sequence[Any], tag: str) -> str:
        shown = (
            f'<{tag} class="number">{cell}</{tag}>' if i in numbers else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line(cells, "td") for cells in lines)
    return f"<table>\n{line(header, 'th')}\n{body}\n</table>"


def _mark(held: bool) -> str:
    return '<span class="ok">held</span>' if held else '<span class="fail">failed</span>'


def _largest(report: Report, kinds: Sequence[str]) -> str:
    """Return the largest absolute difference of some kinds of tensors."""
    found = [row.absolute for row in report.rows if row.kind in kinds]
    return f"{np.max(found):.1e}" if found else ""


_COLUMNS = (("output",), ("input gradient", "parameter gradient"), ("statistic",))


def _grid_table(cases: dict[str, Case], oracle: Report, builtin: Report) -> str:
    groups: dict[tuple[str, str], set[str]] = {}
    for name, case in cases.items():
        groups.setdefault((case.group, case.dtype), set()).add(name)
    lines = []
    # The widest type first; `sorted` keeps that order within a group.
    wide_first = sorted(groups.items(), key=lambda item: -np.dtype(item[0][1]).itemsize)
    for (group, dtype), names in sorted(wide_first, key=lambda item: item[0][0]):
        parts = [
            Report(tuple(row for row in report.rows if row.case in names))
            for report in (oracle, builtin)
        ]
        held = all(bool(part) for part in parts if part.rows)
        numbers = [_largest(part, kinds) for part in parts for kinds in _COLUMNS]
        lines.append([_text(group), dtype, len(names), *numbers, _mark(held)])
    head = [
        f"{what}<br>{name}"
        for name in ("oracle", "built-in")
        for what in ("output", "gradients", "statistics")
    ]
    return _table(["about", "dtype", "cases", *head, ""], lines, range(2, 9))


def _net_table(compared: Sequence[tuple[Net, Report, float]]) -> str:
    lines = []
    for net, report, seconds in compared:
        worst = max(report.rows, key=lambda row: row.excess)
        lines.append(
            [
                _text(net.name),
                "x".join(map(str, net.shape)),
                f"{net.steps}",
                f"{len(report.rows)}",
                *(_largest(report, kinds) for kinds in _COLUMNS),
                f"{_text(worst.tensor)}, {_text(worst.where)}",
                f"{seconds:.0f}",
                _mark(bool(report)),
            ]
        )
    header = [
        "net",
        "data",
        "steps",
        "tensors",
        "output",
        "gradients",
        "statistics",
        "closest to its tolerance",
        "seconds",
        "",
    ]
    return _table(header, lines, (2, 3, 4, 5, 6, 8))


def _seen(report: Report | None, crash: str) -> str:
    """Say what was measured: the failure furthest out, or the largest difference."""
    if report is None:
        return f'<span class="fail">{_text(crash or "no result")}</span>'
    errors = [row for row in report.failures if row.kind == "error"]
    if errors:
        return f'<span class="fail">cannot run</span> <code>{_text(errors[0].note)}</code>'
    worst = max(report.rows, key=lambda row: row.excess)
    kind = "" if worst.kind in worst.tensor else f"{worst.kind} "
    place = f"{_text(kind + worst.tensor)}, {_text(worst.phase)}"
    numbers = f"{worst.absolute:.1e} ({worst.relative:.1e} relative)"
    return f'<span class="{"ok" if report else "fail"}">{numbers}</span><br>{place}'


def _deviation_table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        [
            f"<b>{_text(o.deviation.title)}</b><br>{_text(o.deviation.why)}",
            _seen(o.builtin, o.crash),
            _seen(o.ours, o.crash),
            _mark(bool(o.ours)),
        ]
        for o in outcomes
    ]
    return _table(["behaviour", "built-in, off the oracle by", "ours", "ours"], lines, ())


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(figure: Any, description: str) -> str:
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{_png(figure)}">'


def _distribution(oracle: Report, builtin: Report, cases: dict[str, Case]) -> str:
    from matplotlib.figure import Figure

    dtypes = ("float64", "float32", "float16")
    figure = Figure(figsize=(12, 5.6))
    axes = figure.subplots(2, 3, sharex=True)
    edges = np.linspace(-8.5, 1, 39)
    for row, (name, report) in zip(axes, (("NumPy oracle", oracle), ("built-in", builtin))):
        for axis, dtype in zip(row, dtypes):
            for kind, color in _KINDS.items():
                excess = np.array(
                    [
                        r.excess
                        for r in report.rows
                        if r.kind == kind and cases[r.case].dtype == dtype
                    ]
                )
                # Equal tensors, and NaN, have no logarithm: they stand at the ends.
                values = np.log10(np.clip(excess, 10.0**-8.4, 9.9))
                axis.hist(values, edges, histtype="stepfilled", alpha=0.25, color=color)
                axis.hist(values, edges, histtype="step", color=color, label=kind)
            axis.axvline(0, color="#b3261e", linestyle="--", linewidth=1)
            axis.set_title(f"{dtype}, against the {name}", fontsize=10)
            axis.set_yscale("symlog", linthresh=1)
            axis.set_xticks(
                range(-8, 2, 2), ["≤$10^{-8}$", "$10^{-6}$", "$10^{-4}$", "1%", "allowed"]
            )
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("tensors")
    for axis in axes[1]:
        axis.set_xlabel("largest difference / allowed difference")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    return _figure(figure, "Histograms of differences relative to what is allowed")


def _by_depth(compared: Sequence[tuple[Net, Report, float]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6 * ((len(compared) + 2) // 3)))
    axes = figure.subplots((len(compared) + 2) // 3, 3, squeeze=False).ravel()
    for axis, (net, report, _) in zip(axes, compared):
        for kind in ("parameter gradient", "statistic"):
            worst = report.worst(lambda row: (row.kind, row.tensor))
            names = [key for key in worst if key[0] == kind]
            values = [min(max(worst[key].excess, 1e-8), 10) for key in names]
            places = np.linspace(0, 1, max(len(names), 2))[: len(names)]
            axis.plot(places, values, ".", markersize=4, color=_KINDS[kind], label=kind)
        axis.axhline(1, color="#b3261e", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylim(0.5e-8, 10)
        axis.set_title(net.name, fontsize=10)
        axis.set_xticks([0, 1], ["first", "last"])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(compared) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("difference / allowed")
    figure.tight_layout()
    return _figure(figure, "Differences by parameter, from the first to the last")


@dataclass(frozen=True)
class Study:
    """Everything that goes on the page."""

    cases: dict[str, Case]
    oracle: Report
    builtin: Report
    nets: list[tuple[Net, Report, float]]
    deviations: list[Outcome]
    command: str
    seconds: float

    @property
    def held(self) -> bool:
        """Whether ours held everywhere."""
        reports = [self.oracle, self.builtin, *(report for _, report, _ in self.nets)]
        return all(map(bool, reports)) and all(o.ours for o in self.deviations)

    @property
    def compared(self) -> int:
        """How many tensors were compared."""
        reports = [self.oracle, self.builtin, *(report for _, report, _ in self.nets)]
        reports += [o.ours for o in self.deviations if o.ours is not None]
        return sum(len(report.rows) for report in reports)

    def failures(self) -> Iterator[str]:
        """Yield a line for every failure of ours."""
        named = [("oracle", self.oracle), ("built-in", self.builtin)]
        named += [(net.name, report) for net, report, _ in self.nets]
        named += [(o.deviation.title, o.ours) for o in self.deviations if o.ours is not None]
        for name, report in named:
            for row in report.failures:
                numbers = f"{row.absolute:.1e}, allowed {row.allowed:.1e}"
                yield " ".join(
                    f"{name}: {row.case} {row.kind} {row.tensor} {numbers}, {row.where}".split()
                )
        for outcome in self.deviations:
            if outcome.ours is None:
                yield f"{outcome.deviation.title}: {outcome.crash}"

    def page(self) -> str:
        """Return the page."""
        failures = list(self.failures())
        verdict = (
            f"Everything held: {self.compared:,} tensors compared."
            if self.held
            else f"{len(failures):,} of {self.compared:,} tensors are out of tolerance."
        )
        versions = ", ".join(
            [
                f"scratchbn {scratchbn.__version__}",
                f"mxnet {mx.__version__}",
                f"numpy {np.__version__}",
                f"Python {platform.python_version()}",
                platform.machine(),
                time.strftime("%Y-%m-%d"),
                f"{self.seconds:.0f} s",
            ]
        )
        shown = "".join(f"<li>{_text(line)}</li>" for line in failures[:200])
        parts = [
            "<h1>Parity of ScratchBatchNorm</h1>",
            f'<p class="quiet">{_text(versions)}<br><code>{_text(self.command)}</code></p>',
            f'<p class="verdict {"ok" if self.held else "fail"}">{verdict}</p>',
            *([f"<h2>Failures</h2><ul>{shown}</ul>"] if failures else []),
            "<h2>Single layers</h2>",
            _LAYERS_TEXT,
            _grid_table(self.cases, self.oracle, self.builtin),
            _TOLERANCE_TEXT,
            "<h2>Distribution of the differences</h2>",
            _DISTRIBUTION_TEXT,
            _distribution(self.oracle, self.builtin, self.cases),
        ]
        if self.nets:
            parts += ["<h2>Nets</h2>", _NETS_TEXT, _net_table(self.nets), _DEPTH_TEXT]
            parts += [_by_depth(self.nets)]
        parts += [
            "<h2>Where the built-in differs from the formulas</h2>",
            _DEVIATIONS_TEXT,
            _deviation_table(self.deviations),
        ]
        body = "\n".join(parts)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>Parity of ScratchBatchNorm</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )


def _write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- the script ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Exit status: 0 if everything held, 1 if not."
    )
    parser.add_argument("--full", action="store_true", help="combine options, more nets; minutes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/parity/report.html"),
        metavar="FILE",
        help="the page (default: runs/parity/report.html)",
    )
    parser.add_argument("--no-nets", dest="nets", action="store_false", help="layers only")
    parser.add_argument("--deviation", type=int, help=argparse.SUPPRESS)
    return parser


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
    arguments = build_parser().parse_args(argv)
    if arguments.deviation is not None:
        return _print_deviation(arguments.deviation)
    began = time.perf_counter()
    grid = standard_grid(full=arguments.full)
    with_oracle = [*grid, *_ONLY_OURS]

    def bar(items: Sequence[Any], what: str) -> Any:
        return tqdm(items, desc=what, unit="case", leave=False, disable=None)

    oracle = run_grid(ScratchBatchNorm, OracleLayer, bar(with_oracle, "layers, oracle"))
    builtin = run_grid(ScratchBatchNorm, nn.BatchNorm, bar(grid, "layers, built-in"))
    compared = []
    for net in bar(nets(arguments.full) if arguments.nets else [], "nets"):
        start = time.perf_counter()
        report = net.compare()
        compared.append((net, report, time.perf_counter() - start))
    outcomes = [try_deviation(i) for i in bar(range(len(DEVIATIONS)), "known deviations")]
    study = Study(
        cases={case.name: case for case in with_oracle},
        oracle=oracle,
        builtin=builtin,
        nets=compared,
        deviations=outcomes,
        command=" ".join(
            ["python scripts/parity_report.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        seconds=time.perf_counter() - began,
    )
    _write(study.page(), arguments.out)
    for line in study.failures():
        print(line)
    print(
        f"{'held' if study.held else 'FAILED'}: {study.compared} tensors compared; {arguments.out}"
    )
    return 0 if study.held else 1


if __name__ == "__main__":
    sys.exit(main())
