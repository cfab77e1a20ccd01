"""Take LeNet, or a net of GluonCV's zoo, out in every form there is, and compare them.

The forms: the training graph of ``net.export``, the same with MXNet's ``BatchNorm``, the folded
inference graph in three styles, and ONNX.
"""

from __future__ import annotations

import argparse
import json
import signal
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

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: end at once, in silence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scratchbn import ScratchBatchNorm, convert_files
from scratchbn._command import Parser, fail, guarded, integer
from scratchbn._text import first_line, fitted, terminal_width
from scratchbn._writing import staged_folder
from scratchbn.deploy import export_inference, export_onnx
from scratchbn.deploy._files import write_model
from scratchbn.deploy.check import compare_outputs
from scratchbn.environment.install import install_command

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

from models.lenet import lenet

STYLES = ("dwconv", "affine", "batchnorm")
FORMS = ("training", "builtin", *(f"inference-{style}" for style in STYLES), "model.onnx")
# Of the outputs, relative to the largest: float32 through a deep net.
TOLERANCE = 1e-4

_NAME = "export_model.py"
_BUILT_IN = "net with nn.BatchNorm"
_OURS = "net with ScratchBatchNorm"
_TRAINING_BATCHES = 3

_EPILOG = """\
The difference is the largest over all outputs on random input, from the outputs of the net with
ScratchBatchNorm, relative to the largest of them. Times are medians of calls in turn with all
others, in one process; the ratio is to the net with nn.BatchNorm. All but ONNX, which onnxruntime
runs, are hybridized with static_alloc and static_shape. Without --params the net has random
weights, and running statistics of random images.

Exit status: 0 if every form computes what the net does; 1 if not; 2 for bad input."""

Run = Callable[[], "list[np.ndarray]"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add(
        "--net",
        default="lenet",
        metavar="NAME",
        help="lenet, or a name of gluoncv.model_zoo.get_model_list() that takes images, as "
        "cifar_resnet20_v1 (default: lenet)",
    )
    add("--params", metavar="FILE", help="trained parameters, as net.save_parameters wrote them")
    add("--batch", type=integer(1), default=1, metavar="N", help="images per call (default: 1)")
    add(
        "--size",
        type=integer(1),
        metavar="PIXELS",
        help="height and width of an image (default: 28 for lenet, 32 for cifar nets, 299 for "
        "inceptionv3, else 224)",
    )
    add("--calls", type=integer(1), default=50, help="timed calls of each (default: 50)")
    add("--seed", type=integer(0, 2**31 - 1), default=1, help="for weights and input (default: 1)")
    add(
        "--out",
        type=Path,
        default=Path("runs/export"),
        metavar="DIR",
        help="where to write the files, report.json and graph.png (default: runs/export)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status, which ``--help`` explains."""
    options = build_parser().parse_args(argv)
    try:
        for needed in ("matplotlib.figure", "tqdm"):
            import_module(needed)
        nets = build_nets(options.net, options.params, options.seed, image_shape(options))
        options.out.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        command = install_command("cpu", "demo", "gluoncv")
        return fail(_NAME, 2, f"{error}: {command} has all this needs")
    except (OSError, ValueError) as error:
        return fail(_NAME, 2, str(error))
    if (options.out / "report.json").exists():
        print(f"note: {options.out} holds forms of a net; they are replaced at the end")
    with staged_folder(options.out) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot decide type")  # of data; it is float32
        problems = write_forms(nets.ours, nets.x, folder)
        rows = compare(nets, folder, problems, options.calls)
        draw_graphs(folder / "builtin-symbol.json", folder / "inference-dwconv-symbol.json", folder)
        report = {"net": options.net, "input": list(nets.x.shape), "rows": list(map(asdict, rows))}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    header = ("form", "size", "operators", "difference", "median ms", "ratio", "")
    print(f"{options.net}, input {'x'.join(map(str, nets.x.shape))}")
    print(fitted(header, [row.cells() for row in rows], terminal_width()))
    print(f"written to {options.out}", flush=True)
    wrong = [row for row in rows if row.difference is not None and not row.difference <= TOLERANCE]
    if wrong:
        return fail(_NAME, 1, f"{wrong[0].name} differs by {wrong[0].difference:.1e} from the net")
    made = " that could be made" * bool(problems)
    print(f"holds: every form{made} computes what the net does")
    return 0


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
    """Build a net twice, with trained parameters or random ones; ValueError if it cannot run."""
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
            _randomize_norms(ours, rng, (max(4, shape[0]), *shape[1:]))
        with tempfile.TemporaryDirectory() as folder:
            ours.save_parameters(f"{folder}/net.params")
            builtin.load_parameters(f"{folder}/net.params")
        mx.nd.waitall()
    except (mx.MXNetError, AssertionError, ValueError) as error:
        what = f"with the parameters {params!r}" if params else "as they are"
        raise ValueError(
            f"{name} cannot run on input of shape {shape} {what}: {first_line(error)}"
        ) from error
    return Nets(ours, builtin, mx.nd.array(rng.normal(size=shape)))


def _build(name: str, norm: Any) -> Any:
    with mx.name.NameManager():  # names that do not depend on what was built before
        if name == "lenet":
            return lenet(norm, prefix="lenet_")
        from models.zoo import get_model  # needs GluonCV

        return get_model(name, norm)


def _randomize_norms(net: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Give the norms parameters that are not their defaults, and statistics of random images."""
    for name, parameter in net.collect_params().items():
        if name.endswith("gamma"):
            parameter.set_data(mx.nd.array(rng.uniform(0.5, 1.5, parameter.shape)))
        elif name.endswith("beta"):
            parameter.set_data(mx.nd.array(rng.normal(0, 0.1, parameter.shape)))
    for _ in range(_TRAINING_BATCHES):
        with autograd.train_mode():
            net(mx.nd.array(rng.normal(size=shape)))


# --- forms -------------------------------------------------------------------------------------


def write_forms(net: Any, x: Any, folder: Path) -> dict[str, str]:
    """Write a net in every form; return why a form is missing, by name."""
    net.hybridize()
    net(x)
    net.export(str(folder / "training"))
    symbol, params = _files(folder, "training")
    write_model(folder / "builtin", *convert_files(symbol, params, to="builtin")[:2])
    for style in STYLES:
        export_inference(net, folder / f"inference-{style}", x, style=style)
    try:
        export_onnx(net, folder / "model.onnx", x)
    except (ImportError, ValueError) as error:
        return {"model.onnx": " ".join(str(error).split())}
    return {}


def _files(folder: Path, form: str) -> list[str]:
    names = [form] if form == "model.onnx" else [f"{form}-symbol.json", f"{form}-0000.params"]
    return [str(folder / name) for name in names]


def operators(symbol: Path) -> dict[int, dict[str, Any]]:
    """Return the operators of a symbol file, by their number in it."""
    nodes = json.loads(symbol.read_text("utf-8"))["nodes"]
    return {i: node for i, node in enumerate(nodes) if node["op"] != "null"}


def _count_operators(folder: Path, form: str) -> int:
    if form == "model.onnx":
        return len(import_module("onnx").load(str(folder / form)).graph.node)
    return len(operators(folder / f"{form}-symbol.json"))


def _load(folder: Path, form: str, x: Any) -> Run:
    """Return what runs a form on `x`; ImportError if it cannot be run here."""
    files = _files(folder, form)
    if form != "model.onnx":
        return _runner(SymbolBlock.imports(files[0], ["data"], files[1]), x)
    try:
        runtime = import_module("onnxruntime")
    except ImportError as error:
        raise ImportError("onnxruntime is not installed") from error
    settings = runtime.SessionOptions()
    # Its threads would wait for work beside the calls that are timed after it.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(files[0], settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.asnumpy()}
    return lambda: list(session.run(None, feed))


def _runner(net: Any, x: Any) -> Run:
    net.hybridize(static_alloc=True, static_shape=True)

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
    size: int | None = None
    operators: int | None = None
    difference: float | None = None
    ms: float | None = None
    ratio: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """Return the line as text."""
        size = None if self.size is None else self.size / 1024
        formats = ("{:,.0f} KiB", "{}", "{:.1e}", "{:.2f}", "{:.2f}")
        values = (size, self.operators, self.difference, self.ms, self.ratio)
        texts = ["" if v is None else text.format(v) for text, v in zip(formats, values)]
        return [self.name, *texts, self.note]


def compare(nets: Nets, folder: Path, problems: dict[str, str], calls: int) -> list[Row]:
    """Run nets and forms on the same input, in turn, and compare outputs and times."""
    runs = {_BUILT_IN: _runner(nets.builtin, nets.x), _OURS: _runner(nets.ours, nets.x)}
    notes = dict(problems)
    for form in FORMS:
        try:
            if form not in problems:
                runs[form] = _load(folder, form, nets.x)
        except ImportError as error:
            notes[form] = str(error)
    outputs = {name: run() for name, run in runs.items()}
    medians = _medians(runs, calls)
    rows = []
    for name in (_BUILT_IN, _OURS, *FORMS):
        known: dict[str, Any] = {"note": notes.get(name, "")}
        if name in FORMS and name not in problems:
            known["size"] = sum(Path(file).stat().st_size for file in _files(folder, name))
            known["operators"] = _count_operators(folder, name)
        if name in runs:
            difference, size = compare_outputs(outputs[name], outputs[_OURS])
            known["difference"] = difference / (size or 1)
            known["ms"], known["ratio"] = medians[name], medians[name] / medians[_BUILT_IN]
        rows.append(Row(name, **known))
    return rows


def _medians(runs: dict[str, Run], calls: int) -> dict[str, float]:
    """Return the median time of a call in ms; who is called next is drawn at random."""
    from tqdm import tqdm

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
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


# --- picture -----------------------------------------------------------------------------------

_ROWS = 24  # operators in a column
_COLORS = {
    "BatchNorm": "#f4b183",
    "Convolution": "#9dc3e6",
    "FullyConnected": "#9dc3e6",
    "Activation": "#c5e0b4",
    "Pooling": "#ffe699",
}


def draw_graphs(before: Path, after: Path, folder: Path) -> None:
    """Draw the operators of two symbol files side by side as ``graph.png``."""
    from matplotlib.figure import Figure

    graphs = [("before", *_layout(before)), ("after", *_layout(after))]
    widths = [1 + max(x for x, _ in places.values()) for _, _, places in graphs]
    height = 1 + max(y for _, _, places in graphs for _, y in places.values())
    figure = Figure(figsize=(3.5 * sum(widths), 0.85 * height + 1), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=widths)
    for axis, width, (title, nodes, places) in zip(axes, widths, graphs):
        axis.set_title(f"{title} folding: {len(nodes)} operators")
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axis.set_axis_off()
        _draw(axis, nodes, places)
    figure.savefig(folder / "graph.png", dpi=80)


def _layout(symbol: Path) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[int, int]]]:
    """Return the operators of a graph and a place (column, row) for each, in order."""
    nodes = operators(symbol)
    return nodes, {i: divmod(at, _ROWS) for at, i in enumerate(nodes)}


def _draw(axis: Any, nodes: dict[int, Any], places: dict[int, tuple[int, int]]) -> None:
    order = {i: at for at, i in enumerate(nodes)}
    for i, node in nodes.items():
        for source in dict.fromkeys(entry[0] for entry in node["inputs"] if entry[0] in nodes):
            bend = 0.0 if order[i] - order[source] == 1 else 0.3  # past what is between
            arrow: dict[str, Any] = {"arrowstyle": "-|>", "shrinkA": 23, "shrinkB": 13}
            arrow["connectionstyle"] = f"arc3,rad={bend}"
            axis.annotate("", places[i], places[source], arrowprops=arrow)
    for i, node in nodes.items():
        x, y = places[i]
        box = {"boxstyle": "round", "facecolor": _COLORS.get(node["op"], "#ededed")}
        axis.text(x, y, _operator(node), ha="center", va="center", fontsize=9, bbox=box)
        axis.text(x, y + 0.28, node["name"][-34:], ha="center", va="center", fontsize=6)


def _operator(node: dict[str, Any]) -> str:
    attrs = node.get("attrs", {})
    what = attrs.get("act_type") or attrs.get("pool_type") or ""
    if node["op"] == "Convolution":
        what = attrs["kernel"].strip("()").replace(", ", "x").rstrip(",")
        what += " grouped" if attrs.get("num_group", "1") != "1" else ""
    return f"{node['op']} {what}".rstrip()


if __name__ == "__main__":
    sys.exit(guarded(_NAME, main))
