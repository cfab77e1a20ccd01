"""Take LeNet, or a net of GluonCV's zoo, out in every form there is, and compare them.

The forms: the training graph of ``net.export``, the same with MXNet's ``BatchNorm``, the folded
inference graph in three styles, and ONNX.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from _scripting import Parser, staged

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STYLES = ("dwconv", "affine", "batchnorm")
# Of the outputs, relative to the largest: float32 through a deep net.
TOLERANCE = 1e-4

_BUILT_IN = "net with nn.BatchNorm"
_OURS = "net with ScratchBatchNorm"
_STATIC = {"static_alloc": True, "static_shape": True}
_LARGEST_SEED = 2**31 - 1
_TRAINING_BATCHES = 3

_EPILOG = """\
The difference is the largest over all outputs on random input, from the outputs of the net with
ScratchBatchNorm, relative to the largest of them. Times are medians of calls in turn with all
others, in one process; the ratio is to the net with nn.BatchNorm. All but ONNX, which onnxruntime
runs, are hybridized with static_alloc and static_shape. Without --params the net has random
weights, and running statistics of random images.

Exit status: 0 if every form computes what the net does; 1 if not; 2 for bad input."""

Run = Callable[[], "list[np.ndarray]"]


def _integer(least: int, most: int | None = None) -> Any:
    def parse(text: str) -> int:
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"must be an integer, {bounds}; got {text!r}")
        return int(text)

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--net",
        default="lenet",
        metavar="NAME",
        help="lenet, or a name of gluoncv.model_zoo.get_model_list() that takes images, as "
        "cifar_resnet20_v1 (default: lenet)",
    )
    add("--params", metavar="FILE", help="trained parameters, as net.save_parameters wrote them")
    add("--batch", type=_integer(1), default=1, metavar="N", help="images per call (default: 1)")
    add(
        "--size",
        type=_integer(1),
        metavar="PIXELS",
        help="height and width of an image (default: 28 for lenet, 32 for cifar nets, 299 for "
        "inceptionv3, else 224)",
    )
    add("--calls", type=_integer(1), default=50, help="timed calls of each (default: 50)")
    add(
        "--seed",
        type=_integer(0, _LARGEST_SEED),
        default=1,
        help="for weights and input (default: 1)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/export"),
        metavar="DIR",
        help="where to write the files, report.json and graph.png (default: runs/export)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Parameters
    ----------
    argv : sequence of str, optional
        The command line without the program's name; default: this process's.

    Returns
    -------
    int
        Exit status: 0, 1 or 2; ``--help`` says what they mean.
    """
    options = build_parser().parse_args(argv)
    try:
        for needed in ("scratchbn.deploy", "matplotlib.figure", "rich.table", "tqdm"):
            import_module(needed)
    except (ImportError, OSError) as error:
        return _fail(2, f"{error}: pip install 'scratchbn[cpu,demo]' has all this needs")
    try:
        nets = build_nets(options.net, options.params, options.seed, image_shape(options))
        options.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        return _fail(2, str(error))
    with staged(options.out) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot decide type")  # of data; it is float32
        files = write_forms(nets.ours, nets.x, folder)
        runs = {name: _load(name, file, nets.x) for name, file in files.items() if not file.problem}
        rows = compare(nets, files, runs, options.calls)
        draw_graphs(folder / "builtin-symbol.json", folder / "inference-dwconv-symbol.json", folder)
        report = {
            "net": options.net,
            "input": list(nets.x.shape),
            "rows": [asdict(row) for row in rows],
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print_table(f"{options.net}, input {'x'.join(map(str, nets.x.shape))}", rows)
    print(f"written to {options.out}", flush=True)
    wrong = [row for row in rows if row.difference is not None and not row.difference <= TOLERANCE]
    if wrong:
        return _fail(1, f"{wrong[0].name} differs by {wrong[0].difference:.1e} from the net")
    return 0


def _fail(status: int, message: str) -> int:
    print(f"export_model.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


# --- nets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nets:
    """A net with our layer, its twin with the built-in and the same parameters, and an input."""

    ours: Any
    builtin: Any
    x: Any


def image_shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """Return the shape of a batch of images, (N, channels, height, width)."""
    if options.net == "lenet":
        channels, size = 1, 28
    else:
        sizes = {"cifar": 32, "inceptionv3": 299}
        channels, size = 3, next((n for k, n in sizes.items() if k in options.net), 224)
    size = options.size or size
    return options.batch, channels, size, size


def build_nets(name: str, params: str | None, seed: int, shape: tuple[int, ...]) -> Nets:
    """Build a net twice, with our layer and with the built-in.

    Parameters
    ----------
    name : str
        ``'lenet'`` or a name of GluonCV's zoo.
    params : str or None
        A file of ``net.save_parameters``; without, the weights are random.
    seed : int
        For weights and input.
    shape : tuple of int
        Of the input.

    Raises
    ------
    ImportError
        If GluonCV is needed and missing.
    OSError
        If `params` cannot be read.
    ValueError
        If there is no such net, it does not take input of this shape, or `params` is not its.
    """
    from scratchbn import ScratchBatchNorm

    import mxnet as mx
    from mxnet import autograd
    from mxnet.gluon import nn

    mx.random.seed(seed)
    rng = np.random.default_rng(seed)
    ours, builtin = (_build(name, norm) for norm in (ScratchBatchNorm, nn.BatchNorm))
    if params is not None:
        Path(params).open("rb").close()  # for an OSError that says why
    try:
        ours.initialize(mx.init.Xavier(magnitude=2))
        if params is not None:
            ours.load_parameters(params)
        ours(mx.nd.zeros(shape))
        if params is None:
            _randomize_norms(ours, rng)
        for _ in range(0 if params else _TRAINING_BATCHES):
            with autograd.train_mode():
                ours(mx.nd.array(rng.normal(size=(max(4, shape[0]), *shape[1:]))))
        with tempfile.TemporaryDirectory() as folder:
            ours.save_parameters(f"{folder}/net.params")
            builtin.load_parameters(f"{folder}/net.params")
        mx.nd.waitall()
    except (mx.MXNetError, AssertionError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        what = f"with the parameters {params!r}" if params else "as they are"
        raise ValueError(
            f"{name} cannot run on input of shape {shape} {what}: {said[-1]}"
        ) from error
    return Nets(ours, builtin, mx.nd.array(rng.normal(size=shape)))


def _randomize_norms(net: Any, rng: np.random.Generator) -> None:
    import mxnet as mx

    for name, parameter in net.collect_params().items():
        if name.endswith("gamma"):
            parameter.set_data(mx.nd.array(rng.uniform(0.5, 1.5, parameter.shape)))
        elif name.endswith("beta"):
            parameter.set_data(mx.nd.array(rng.normal(0, 0.1, parameter.shape)))


def _build(name: str, norm: Any) -> Any:
    import mxnet as mx

    with mx.name.NameManager():  # names that do not depend on what was built before
        if name == "lenet":
            from models.lenet import lenet

            return lenet(norm, prefix="lenet_")
        from models.zoo import get_model

        return get_model(name, norm)


# --- forms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One form of a net on disk: its files, how many operators it has, or why it is not there."""

    paths: tuple[Path, ...] = ()
    operators: int = 0
    problem: str = ""


def write_forms(net: Any, x: Any, folder: Path) -> dict[str, Form]:
    """Write a net in every form; returns them by name.

    Parameters
    ----------
    net : HybridBlock
        Initialized.
    x : NDArray
        An input.
    folder : Path
        An existing directory.
    """
    from scratchbn import convert_files
    from scratchbn.deploy import export_inference, export_onnx, write_model

    forms = {}
    net.hybridize()
    net(x)
    net.export(str(folder / "training"))
    forms["training"] = _pair(folder, "training")
    symbol, params = (str(path) for path in forms["training"].paths)
    write_model(folder / "builtin", *convert_files(symbol, params, to="builtin")[:2])
    forms["builtin"] = _pair(folder, "builtin")
    for style in STYLES:
        export_inference(net, folder / f"inference-{style}", x, style=style)
        forms[f"inference-{style}"] = _pair(folder, f"inference-{style}")
    path = folder / "model.onnx"
    try:
        export_onnx(net, path, x)
        forms["model.onnx"] = Form((path,), len(import_module("onnx").load(path).graph.node))
    except (ImportError, ValueError) as error:
        forms["model.onnx"] = Form(problem=" ".join(str(error).split()))
    return forms


def _pair(folder: Path, name: str) -> Form:
    paths = folder / f"{name}-symbol.json", folder / f"{name}-0000.params"
    return Form(paths, len(_operators(paths[0])))


def _operators(symbol: Path) -> list[dict[str, Any]]:
    nodes = json.loads(symbol.read_text("utf-8"))["nodes"]
    return [node for node in nodes if node["op"] != "null"]


def _load(name: str, form: Form, x: Any) -> Run | str:
    """Return what runs a form on `x`, or why it cannot be run here."""
    from mxnet.gluon import SymbolBlock

    if name != "model.onnx":
        return _runner(SymbolBlock.imports(str(form.paths[0]), ["data"], str(form.paths[1])), x)
    try:
        runtime = import_module("onnxruntime")
    except ImportError:
        return "onnxruntime is not installed"
    settings = runtime.SessionOptions()
    # Its threads would wait for work beside the calls that are timed after it.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(
        str(form.paths[0]), settings, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.asnumpy()}
    return lambda: list(session.run(None, feed))


def _runner(net: Any, x: Any) -> Run:
    net.hybridize(**_STATIC)

    def run() -> list[np.ndarray]:
        y = net(x)
        return [part.asnumpy() for part in (y if isinstance(y, (list, tuple)) else [y])]

    return run


# --- comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table; None where something cannot be had, and `note` says why.

    `size` is in bytes, `difference` relative to the largest output of the net, `ms` the median time
    of a call, and `ratio` that to the built-in's.
    """

    name: str
    size: int | None
    operators: int | None
    difference: float | None
    ms: float | None
    ratio: float | None
    note: str = ""


def compare(
    nets: Nets, forms: dict[str, Form], loaded: dict[str, Run | str], calls: int
) -> list[Row]:
    """Run nets and forms on the same input, in turn, and compare outputs and times."""
    from tqdm import tqdm

    runs = {_BUILT_IN: _runner(nets.builtin, nets.x), _OURS: _runner(nets.ours, nets.x)}
    runs.update((name, run) for name, run in loaded.items() if not isinstance(run, str))
    outputs = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    with tqdm(total=calls * len(runs), desc="calls", unit="call", leave=False, disable=None) as bar:
        for _ in range(calls):
            for i in rng.permutation(len(runs)):
                name, run = list(runs.items())[i]
                run()  # what ran before leaves the caches and the threads in some state
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                bar.update()
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    rows = []
    for name in [_BUILT_IN, _OURS, *forms]:
        form = forms.get(name, Form())
        run = loaded.get(name, "")
        ms = medians.get(name)
        rows.append(
            Row(
                name,
                sum(path.stat().st_size for path in form.paths) or None,
                form.operators or None,
                _difference(outputs[name], outputs[_OURS]) if name in outputs else None,
                ms,
                None if ms is None else ms / medians[_BUILT_IN],
                form.problem or (run if isinstance(run, str) else ""),
            )
        )
    return rows


def _difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    size = max(float(np.abs(b).max()) for b in other) or 1.0
    found = [float(np.abs(a - b).max()) / size for a, b in zip(one, other)]
    return math.inf if any(map(math.isnan, found)) else max(found)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    table.add_column("form", no_wrap=True)
    for heading in ("size", "operators", "difference", "median ms", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            row.name,
            _text(row.size, lambda n: f"{n / 1024:,.0f} KiB"),
            _text(row.operators, str),
            _text(row.difference, lambda d: f"{d:.1e}"),
            _text(row.ms, lambda t: f"{t:.2f}"),
            _text(row.ratio, lambda r: f"{r:.2f}"),
            row.note,
        )
    console = Console()
    # A table in a file is not cut to the width of a terminal.
    console.print(table, width=None if console.is_terminal else 120)


def _text(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


# --- picture -----------------------------------------------------------------------------------

_ROWS = 24  # boxes in a column
_BOX_WIDTH, _BOX_HEIGHT, _COLUMN, _ROW = 2.3, 0.52, 2.9, 0.85  # inches
_COLORS = {
    "BatchNorm": "#f4b183",
    "Convolution": "#9dc3e6",
    "Deconvolution": "#9dc3e6",
    "FullyConnected": "#9dc3e6",
    "Activation": "#c5e0b4",
    "relu": "#c5e0b4",
    "Pooling": "#ffe699",
}


def draw_graphs(before: Path, after: Path, folder: Path) -> None:
    """Draw the operators of two symbol files side by side as ``graph.png``.

    Parameters
    ----------
    before, after : Path
        Files of symbols, before and after folding.
    folder : Path
        Where to write the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graphs = [(title, *_layout(path)) for title, path in (("before", before), ("after", after))]
    columns = [1 + max(x for x, _ in places.values()) for _, _, places in graphs]
    height = 1 + max(y for _, _, places in graphs for _, y in places.values())
    size = ((sum(columns) + 1) * _COLUMN, height * _ROW + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, width_ratios=columns, squeeze=False)[0]
    for axis, width, (title, nodes, places) in zip(axes, columns, graphs):
        axis.set_title(f"{title} folding: {len(nodes)} operators", fontsize=13)
        axis.set_xlim(-0.5 * _COLUMN, (width - 0.5) * _COLUMN)
        axis.set_ylim(-(height - 0.4) * _ROW, 0.6 * _ROW)
        axis.set_axis_off()
        _draw(axis, nodes, places)
    figure.savefig(folder / "graph.png", dpi=80)


def _layout(symbol: Path) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[int, int]]]:
    """Return the operators of a graph and a place (column, row) for each, in order.

    Operators follow each other down a column, and on to the next column; so an input comes before
    what it is for, and branches lie one after the other.
    """
    everything = json.loads(symbol.read_text("utf-8"))["nodes"]
    nodes = {i: node for i, node in enumerate(everything) if node["op"] != "null"}
    return nodes, {i: divmod(at, _ROWS) for at, i in enumerate(nodes)}


def _draw(axis: Any, nodes: dict[int, Any], places: dict[int, tuple[int, int]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    order = {i: at for at, i in enumerate(nodes)}
    for i, node in nodes.items():
        x, y = places[i][0] * _COLUMN, -places[i][1] * _ROW
        axis.add_patch(
            FancyBboxPatch(
                (x - _BOX_WIDTH / 2, y - _BOX_HEIGHT / 2),
                _BOX_WIDTH,
                _BOX_HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=_COLORS.get(node["op"], "#ededed"),
                edgecolor="#404040",
            )
        )
        axis.text(x, y + 0.1, _operator(node), ha="center", va="center", fontsize=9)
        axis.text(x, y - 0.13, _short(node["name"]), ha="center", va="center", fontsize=6.5)
        for source in dict.fromkeys(entry[0] for entry in node["inputs"] if entry[0] in nodes):
            _connect(axis, places[source], places[i], order[i] - order[source])


def _connect(axis: Any, start: tuple[int, int], end: tuple[int, int], apart: int) -> None:
    (column, row), (to_column, to_row) = start, end
    x, y, to_x, to_y = column * _COLUMN, -row * _ROW, to_column * _COLUMN, -to_row * _ROW
    if apart == 1 and column == to_column:
        begin, finish, style = (x, y - _BOX_HEIGHT / 2), (to_x, to_y + _BOX_HEIGHT / 2), "arc3"
    elif column == to_column:  # past the boxes between, on their right
        edge = _BOX_WIDTH / 2
        begin, finish = (x + edge, y), (to_x + edge, to_y)
        style = f"arc3,rad={-min(0.4, 0.5 / (apart * _ROW)):.3f}"
    else:
        begin, finish, style = (x + _BOX_WIDTH / 2, y), (to_x - _BOX_WIDTH / 2, to_y), "arc3"
    arrow = {"arrowstyle": "-|>", "color": "#404040", "connectionstyle": style}
    axis.annotate("", finish, begin, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})


def _operator(node: dict[str, Any]) -> str:
    attrs = node.get("attrs", {})
    what = attrs.get("act_type") or attrs.get("pool_type")
    if node["op"] == "Convolution":
        what = attrs["kernel"].strip("()").replace(", ", "x").rstrip(",")
        if attrs.get("num_group", "1") != "1":
            what += " grouped"
    return f"{node['op']} {what}" if what else str(node["op"])


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


if __name__ == "__main__":
    sys.exit(main())
