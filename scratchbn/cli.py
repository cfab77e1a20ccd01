"""The command line: ``scratchbn <command>`` or ``python -m scratchbn <command>``.

What needs mxnet is imported by its command, so that ``--help`` is quick and both it and ``doctor``
work with a broken mxnet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scratchbn import __version__, native
from scratchbn import _demo as demo
from scratchbn._command import Parser, add_job, guarded, integer, named_shape
from scratchbn._interrupt import importing
from scratchbn._text import fitted, reflowed, terminal_width
from scratchbn.environment import doctor, layout
from scratchbn.native import cuda


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of the process; return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(f"scratchbn {arguments.command}", partial(_run, arguments))


def _run(arguments: argparse.Namespace) -> int:
    """Run the command that was asked for; what the user can do about is one line."""
    try:
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ImportError, native.BackendError) as error:
        print(f"scratchbn {arguments.command}: {error}", file=sys.stderr)
        return 1
    return status


def _doctor(arguments: argparse.Namespace) -> int:
    """Report Python, numpy, mxnet, CUDA, GPUs, the device in use and the data found."""
    facts = doctor.doctor_facts()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif not arguments.all:
        print(layout.folded(facts, terminal_width()))
    elif console := _terminal():
        for table in layout.rich_tables(facts):
            console.print(table)
        console.print(layout.verdict(facts), markup=False, highlight=False)
    else:
        print(layout.text(facts))
    return 0 if facts["mxnet"]["error"] is None else 1


def _build_native(arguments: argparse.Namespace) -> int:
    """Compile the kernel that the backends 'auto' and 'native' use; needs a C++ compiler."""
    path = native.build(force=arguments.force)
    if not native.available():
        raise native.BackendError(native.facts()["problem"] or "MXNet did not load the kernel")
    print(f"the compiled kernel: {path}")
    try:
        built = cuda.build(force=arguments.force)
    except native.BackendError as error:  # on CPUs it is of use all the same
        print(f"without kernels for the GPU: {error}")
        return 0
    for capability, code in built.items():
        print(f"for compute capability {capability}: {code}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Train LeNet with ScratchBatchNorm and with nn.BatchNorm on 4,000 digits, for a minute."""
    return demo.run_demo(arguments.data, arguments.epochs, arguments.out, arguments.device)


def _parity(arguments: argparse.Namespace) -> int:
    """Compare ScratchBatchNorm with nn.BatchNorm over a grid, on every backend that can be had."""
    with importing():
        from scratchbn.parity import backends_at_hand, run_grid, standard_grid
        from scratchbn.parity.summary import summary

    cases: Any = standard_grid(full=arguments.full)
    cases = [case for case in cases if case.dtype in (arguments.dtype or [case.dtype])]
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        cases = tqdm(cases, desc="parity", unit="case", leave=False, disable=None)
    backends = arguments.backends or backends_at_hand()
    report = run_grid(cases=cases, seed=arguments.seed, backends=backends)
    if arguments.json:
        report.to_json(arguments.json)
    if arguments.html:
        report.to_html(arguments.html, title="ScratchBatchNorm and nn.BatchNorm")
    print(summary(report, terminal_width(), arguments.all))
    return 0 if report else 1


def _fold(arguments: argparse.Namespace) -> int:
    """Fold the batch normalizations of an exported model into the layers before them."""
    with importing():
        from scratchbn import deploy

    before, options = _model(arguments)
    symbol, params, report = deploy.fold(*before, style=arguments.style, **options)
    shown = report if arguments.all else replace(report, folded=())
    rows = [(line.node, line.result, line.because) for line in (*shown.folded, *shown.kept)]
    if rows:
        print(fitted(("layer", "result", "because"), rows, terminal_width()))
    more = "" if arguments.all or not report.folded else " (--all shows the folded ones)"
    _write(arguments, symbol, params, report)
    print(f"{len(report.folded)} folded, {len(report.kept)} kept{more}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    """Exchange ScratchBatchNorm and MXNet's BatchNorm in an exported model."""
    with importing():
        from scratchbn import convert_files

    before, options = _model(arguments)
    unknown = sorted(options["shapes"].keys() - set(before[0].list_inputs()))
    if unknown:
        raise ValueError(f"--shape must name an input of the symbol, got {unknown[0]!r}")
    symbol, params, report = convert_files(*before, to=arguments.to, **options)
    for entry in report.converted * arguments.all:
        print(reflowed(str(entry), terminal_width()))
    counts, *remarks = str(report).splitlines()
    print("".join(f"{reflowed(line, terminal_width())}\n" for line in remarks), end="")
    _write(arguments, symbol, params, report)
    print(f"{counts}{'' if arguments.all else ' (--all shows them)'}")
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """Run a command as a job of MXNet's parameter server on this machine."""
    with importing():
        from scratchbn.launch import launch

    return launch(arguments.program, arguments.workers, arguments.servers)


def _infer_symbol(arguments: argparse.Namespace) -> int:
    """Write a symbol for inference beside an exported one, for the same parameter file."""
    with importing():
        from scratchbn import deploy

    path, comparison = deploy.write_compared(
        arguments.symbol,
        arguments.out,
        params=arguments.params,
        shapes=dict(arguments.shape),
        verify=arguments.verify,
    )
    print(reflowed(_measured(arguments, comparison), terminal_width()))
    print(f"written: {path}")
    return 0


def _model(arguments: argparse.Namespace) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Read the model, and the options of what rewrites it."""
    with importing():
        from scratchbn import deploy

    for file in _files(arguments.out):
        for read in (arguments.symbol, arguments.params):
            if Path(file).resolve() == Path(read).resolve():
                raise ValueError(f"--out {arguments.out} would replace {read}, which is read")
    model = deploy.load_symbol(arguments.symbol), deploy.load_params(arguments.params)
    return model, {"shapes": dict(arguments.shape), "verify": arguments.verify}


def _write(arguments: argparse.Namespace, symbol: Any, params: Any, report: Any) -> None:
    """Print how far a rewritten model is from the model it was, and write it."""
    with importing():
        from scratchbn import deploy

    print(reflowed(_measured(arguments, report.comparison), terminal_width()))
    there = any(Path(file).exists() for file in _files(arguments.out))
    deploy.write_model(arguments.out, symbol, params)
    print(f"written{', in place of what was there' * there}: {', '.join(_files(arguments.out))}")


def _files(prefix: str) -> tuple[str, str]:
    """Return the files of a model."""
    return f"{prefix}-symbol.json", f"{prefix}-0000.params"


def _measured(arguments: argparse.Namespace, comparison: Any) -> str:
    """Return the line on what was measured."""
    if not arguments.verify:
        return "largest difference: not measured, because of --no-verify"
    if comparison.unknown:
        return f"largest difference: not measured, give --shape {comparison.unknown}=N,C,..."
    return str(comparison)


def _terminal() -> Any:
    """Return rich's console if standard output is a terminal and rich is installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="scratchbn", description="Batch normalization for MXNet Gluon, written from scratch."
    )
    parser.add_argument("--version", action="version", version=f"scratchbn {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="command"
    )

    def add(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[..., Any]:
        """Add a command, whose help is its function's docstring; return what adds its options."""
        doc = (run.__doc__ or name).rstrip(".")
        help = doc[0].lower() + doc[1:]
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command.add_argument

    option = add("doctor", _doctor)
    option("--all", action="store_true", help="show what is as it should be too")
    option("--json", action="store_true", help="print JSON for programs to read")

    option = add("build-native", _build_native)
    option("--force", action="store_true", help="build it even if it is there")

    option = add("demo", _demo)
    data = "sample, mnist, fashion, or a directory with the four IDX files (default: sample)"
    option("--data", default="sample", help=data)
    epochs = f"passes over the training set (default: {demo.EPOCHS})"
    option("--epochs", type=integer(1), default=demo.EPOCHS, help=epochs)
    out = f"where to write the curves, numbers and nets (default: {demo.OUT})"
    option("--out", default=demo.OUT, metavar="DIR", help=out)
    option("--device", default="auto", help="auto, cpu, gpu or gpu:1 (default: auto)")

    option = add("parity", _parity)
    dtypes = ("float64", "float32", "float16")
    only = "only cases of this dtype; may be given more than once"
    option("--all", action="store_true", help="show the comparisons that agree too")
    option("--full", action="store_true", help="combine options; takes minutes")
    option("--dtype", action="append", choices=dtypes, help=only)
    backends = "of portable, native and auto (default: all that can be had without building)"
    option("--backends", nargs="+", metavar="BACKEND", help=backends)
    option("--seed", type=integer(0), default=0, help="for data and parameters (default: 0)")
    option("--json", metavar="FILE", help="write every comparison as JSON")
    option("--html", metavar="FILE", help="write a page with the tables")

    option = add("fold", _fold)
    _add_model(option)
    option(
        "--style",
        choices=("dwconv", "affine", "batchnorm"),
        default="dwconv",
        help="how to write what cannot be folded: 1x1 depthwise convolutions, multiplications and "
        "additions, or BatchNorm nodes (default: dwconv)",
    )

    option = add("convert", _convert)
    _add_model(option)
    option(
        "--to",
        required=True,
        choices=("builtin", "scratch"),
        help="builtin: MXNet's BatchNorm nodes; scratch: the training graph of ScratchBatchNorm",
    )

    option = add("infer-symbol", _infer_symbol)
    option("symbol", help="model-symbol.json")
    params = "for shapes and types (default: the newest model-0000.params beside the symbol)"
    option("--params", metavar="FILE", help=params)
    option("--out", metavar="FILE", help="the file to write (default: model-infer-symbol.json)")
    _add_shape(option)

    add_job(add("launch", _launch))
    return parser


def _add_model(option: Callable[..., Any]) -> None:
    files = "write PREFIX-symbol.json and -0000.params"
    option("symbol", help="model-symbol.json")
    option("params", help="model-0000.params")
    option("--all", action="store_true", help="list what went as it should too")
    option("--out", required=True, metavar="PREFIX", help=files)
    _add_shape(option)


def _add_shape(option: Callable[..., Any]) -> None:
    shape = "shape of an input, as data=1,3,224,224, to run the model on; one for each input"
    option(
        "--shape", action="append", default=[], type=named_shape, metavar="NAME=N,C,...", help=shape
    )
    no = "write the model even if its outputs are wrong: they are not compared"
    option("--no-verify", dest="verify", action="store_false", help=no)
