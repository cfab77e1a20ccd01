"""The command line: ``scratchbn <command>`` or ``python -m scratchbn <command>``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scratchbn import _runtime

Section = tuple[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Command:
    """One subcommand; a row of :data:`COMMANDS`.

    Attributes
    ----------
    name, help : str
        What the user types, and one line about it.
    add_arguments : callable
        Takes the subcommand's parser and adds its arguments.
    run : callable
        Takes the parsed arguments and returns the exit status. What it needs beyond the standard
        library it imports itself, so that ``--help`` stays quick and works with a broken mxnet.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program name; by default those of the process.

    Returns
    -------
    int
        Exit status.

    Raises
    ------
    SystemExit
        By argparse: status 0 after ``--help``, 2 after arguments it does not know.
    """
    parser = argparse.ArgumentParser(
        prog="scratchbn", description="Batch normalization for MXNet Gluon, written from scratch."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs to read")


def _run_doctor(arguments: argparse.Namespace) -> int:
    facts = _runtime.doctor_facts()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(_sections(facts))
    else:
        _print_plain(_sections(facts))
    return 0 if facts["mxnet"]["error"] is None else 1


def _sections(facts: dict[str, Any]) -> list[Section]:
    """Lay out the facts as titled lists of (name, value)."""
    mxnet, cuda, device = facts["mxnet"], facts["cuda"], facts["device"]
    backend = facts["backend"]
    features = mxnet["features"]
    sections: list[Section] = [
        (
            "System",
            [
                ("scratchbn", facts["scratchbn"] or "not installed, run from its source tree"),
                ("Python", f"{facts['python']['version']}  {facts['python']['executable']}"),
                ("platform", facts["platform"]["system"]),
                ("CPUs", str(facts["platform"]["cpus"])),
                ("numpy", facts["numpy"]),
                *facts["environment"].items(),
            ],
        ),
        (
            "mxnet",
            [
                ("distribution", _listed(mxnet["distributions"]) or "none"),
                ("import", mxnet["error"] or f"works, {mxnet['version']}  {mxnet['path']}"),
                ("built with", " ".join(name for name, on in features.items() if on) or "unknown"),
                ("without", " ".join(name for name, on in features.items() if not on)),
            ],
        ),
        (
            "CUDA",
            [
                ("driver", cuda["problem"] or f"supports CUDA {cuda['driver_supports']}"),
                *[(f"gpu({gpu['index']})", _gpu_text(gpu)) for gpu in cuda["gpus"]],
                *[
                    (name, f"{library['version'] or 'version unknown'}  {library['path']}")
                    for name, library in cuda["libraries"].items()
                ],
                *([] if cuda["libraries"] else [("libraries", "none from nvidia-*-cu11")]),
            ],
        ),
        (
            "Device",
            [("auto", "unknown" if device is None else f"{device['auto']}: {device['because']}")],
        ),
        (
            "Backend",
            [
                ("chosen", backend["chosen"]),
                ("auto on a CPU", backend["auto"]),
                ("on a GPU", "portable"),
                ("kernel", backend["problem"] or backend["library"]),
                ("compiler", backend["compiler"] or "none found"),
            ],
        ),
        (
            "Optional packages",
            [(name, version or "not installed") for name, version in facts["packages"].items()],
        ),
        ("Data", list(facts["data"].items())),
        ("Advice", [("!", line) for line in facts["advice"]]),
    ]
    return [(title, [row for row in rows if row[1]]) for title, rows in sections if rows]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _gpu_text(gpu: dict[str, Any]) -> str:
    verdicts = {
        True: "the wheel has code for it",
        False: "the wheel has no code for it",
        None: "not known whether this mxnet has code for it",
    }
    return f"{gpu['name']}, compute capability {gpu['capability']}, {verdicts[gpu['wheel_runs']]}"


def _print_plain(sections: list[Section]) -> None:
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for title, rows in sections:
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")


def _print_rich(sections: list[Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = max(len(name) for _, rows in sections for name, _ in rows)
    console = Console()
    for title, rows in sections:
        table = Table(
            title=Text(title, style="bold"), title_justify="left", show_header=False, box=None
        )
        table.add_column(style="cyan", min_width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        console.print(table)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer that is not negative, got {text!r}")
    return int(text)


def _add_build_native_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="build it even if it is there")


def _run_build_native(arguments: argparse.Namespace) -> int:
    from scratchbn import native

    try:
        path = native.build(force=arguments.force)
        if not native.available():
            raise native.BackendError(native.facts()["problem"] or "MXNet did not load the kernel")
    except (native.BackendError, ImportError) as error:
        print(f"scratchbn build-native: {error}", file=sys.stderr)
        return 1
    print(f"the compiled kernel: {path}")
    return 0


def _add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="combine options; takes minutes")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("float64", "float32", "float16"),
        help="only cases of this dtype; may be given more than once",
    )
    parser.add_argument(
        "--seed", type=_natural, default=0, help="for data and parameters (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every comparison as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with the tables")


def _run_parity(arguments: argparse.Namespace) -> int:
    from scratchbn.parity import run_grid, standard_grid

    cases: Any = standard_grid(full=arguments.full)
    cases = [case for case in cases if case.dtype in (arguments.dtype or [case.dtype])]
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        cases = tqdm(cases, desc="parity", unit="case", leave=False, disable=None)
    report = run_grid(cases=cases, seed=arguments.seed)
    if arguments.json:
        report.to_json(arguments.json)
    if arguments.html:
        report.to_html(arguments.html, title="ScratchBatchNorm and nn.BatchNorm")
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich_table(report.verdict, *report.table())
    else:
        print(report)
    return 0 if report else 1


def _print_rich_table(title: str, header: list[str], lines: list[list[str]], more: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=None)
    for name in header:
        table.add_column(name, overflow="fold")
    for line in lines:
        style = "bold red" if "FAIL" in line else ""
        table.add_row(*(Text(cell, style=style) for cell in line))
    Console().print(table, more)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("symbol", help="model-symbol.json")
    parser.add_argument("params", help="model-0000.params")
    parser.add_argument(
        "--out", required=True, metavar="PREFIX", help="write PREFIX-symbol.json and -0000.params"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_input_shape,
        metavar="NAME=N,C,...",
        help="shape of an input, as data=1,3,224,224, to run the model on; one for each input",
    )


def _add_fold_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "--style",
        choices=("dwconv", "affine", "batchnorm"),
        default="dwconv",
        help="how to write what cannot be folded: 1x1 depthwise convolutions, multiplications and "
        "additions, or BatchNorm nodes (default: dwconv)",
    )


def _input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, lengths = text.partition("=")
    try:
        shape = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=N,C,... as data=1,3,224,224, got {text!r}")
    return name, shape


def _run_fold(arguments: argparse.Namespace) -> int:
    from scratchbn import deploy

    try:
        before = deploy.load_symbol(arguments.symbol), deploy.load_params(arguments.params)
        shapes = {**deploy.stated_shapes(*before), **dict(arguments.shape)}
        symbol, params, report = deploy.fold(*before, shapes=shapes, style=arguments.style)
        print(report)
        _write_compared(before, (symbol, params), shapes, arguments.out)
    except (OSError, ValueError) as error:
        print(f"scratchbn fold: {error}", file=sys.stderr)
        return 1
    return 0


def _write_compared(before: Any, after: Any, shapes: dict[str, Any], prefix: str) -> None:
    """Print how far a rewritten model is from the model it was, and write it."""
    from scratchbn import deploy

    inputs = set(before[0].list_inputs()) - {deploy.plain_name(name) for name in before[1]}
    unknown = sorted(n for n in inputs if min(shapes.get(n, ()), default=0) < 1)
    if unknown:
        print(f"largest difference: not measured, give --shape {unknown[0]}=N,C,...")
    else:
        difference, size = deploy.largest_difference(before, after, shapes)
        print(f"largest difference on random input: {difference:.1e}, of {size:.1e}")
    deploy.write_model(prefix, *after)
    print(f"written: {prefix}-symbol.json, {prefix}-0000.params")


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=("builtin", "scratch"),
        help="builtin: MXNet's BatchNorm nodes; scratch: the training graph of ScratchBatchNorm",
    )


def _run_convert(arguments: argparse.Namespace) -> int:
    from scratchbn import convert_files, deploy

    try:
        before = deploy.load_symbol(arguments.symbol), deploy.load_params(arguments.params)
        shapes = {**deploy.stated_shapes(*before), **dict(arguments.shape)}
        unknown = sorted(shapes.keys() - set(before[0].list_inputs()))
        if unknown:
            raise ValueError(f"--shape must name an input of the symbol, got {unknown[0]!r}")
        symbol, params, report = convert_files(*before, to=arguments.to)
        for entry in report.converted:
            print(entry)
        print(report)
        _write_compared(before, (symbol, params), shapes, arguments.out)
    except (OSError, ValueError) as error:
        print(f"scratchbn convert: {error}", file=sys.stderr)
        return 1
    return 0


COMMANDS: tuple[Command, ...] = (
    Command(
        "doctor",
        "report Python, numpy, mxnet, CUDA, GPUs, the device in use and the data found",
        _add_doctor_arguments,
        _run_doctor,
    ),
    Command(
        "build-native",
        "compile the CPU kernel that the backends 'auto' and 'native' use; needs a C++ compiler",
        _add_build_native_arguments,
        _run_build_native,
    ),
    Command(
        "parity",
        "compare ScratchBatchNorm with MXNet's nn.BatchNorm over a grid of shapes and options",
        _add_parity_arguments,
        _run_parity,
    ),
    Command(
        "fold",
        "fold the batch normalizations of an exported model into the layers before them",
        _add_fold_arguments,
        _run_fold,
    ),
    Command(
        "convert",
        "exchange ScratchBatchNorm and MXNet's BatchNorm in an exported model",
        _add_convert_arguments,
        _run_convert,
    ),
)
