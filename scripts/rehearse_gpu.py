"""Run the GPU path on a machine without a card: on stand-ins for CUDA that compute nothing.

The real mxnet-cu112 and the real NVRTC run on CUDA libraries whose memory is the host's and whose
kernels are only noted down, so that wrong numbers are expected and everything else is a failure.
docs/gpu.md says what this proves. Prints a Markdown table; ends with 1 if something failed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from scratchbn._command import Parser, fail, integer
from scratchbn._text import table
from scratchbn._writing import check_directory, write_text

from rehearsal import checks, house, suite
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what is needed, run tests and checks; return the exit status."""
    parser = Parser(prog="rehearse_gpu", description=__doc__)
    parser.add_argument("tests", nargs="*", help="test files (default: the list in docs/gpu.md)")
    parser.add_argument("--backend", action="append", help="default: each that runs on a GPU")
    parser.add_argument("--skip-tests", action="store_true", help="the checks only, in a minute")
    parser.add_argument("--skip-checks", action="store_true", help="the tests only")
    parser.add_argument("--jobs", type=integer(1), default=2, help="processes (default: 2)")
    parser.add_argument("--report", type=Path, help="a file for the Markdown table")
    options = parser.parse_args(arguments)
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("nm") is None:
        return fail(parser.prog, 1, "needs g++ and nm; on Debian: apt-get install g++ binutils")
    try:
        if options.report is not None:
            check_directory(options.report)
        environment = house.stage(compiler)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return fail(parser.prog, 1, str(error))
    missing = [test for test in options.tests if not Path(house.REPOSITORY, test).exists()]
    if missing:
        return fail(parser.prog, 2, f"no such test file: {', '.join(missing)}")
    try:
        backends = options.backend or known_backends(environment)
    except subprocess.CalledProcessError:
        return fail(parser.prog, 1, "mxnet-cu112 does not run on the stand-ins: see above")
    files = [] if options.skip_tests else options.tests or suite.TESTS
    questions = () if options.skip_checks else checks.CHECKS
    rows, problems = rehearse(files, questions, backends, environment, options.jobs)
    report = table(("rehearsed", "backend", "result", "details"), rows, markdown=True)
    if problems:
        report += "\n\n" + "\n".join(f"- {' '.join(p.split())[:600]}" for p in problems)
    print(report)
    if options.report is not None:
        write_text(options.report, report + "\n")
    return 1 if problems else 0


_PROBE = """
import scratchbn, scratchbn.backends as backends
import mxnet as mx
for name in backends.BACKENDS:
    try:
        scratchbn.set_backend(name)
        layer = scratchbn.ScratchBatchNorm()
        layer.initialize(ctx=mx.gpu(0))
        layer.hybridize()
        layer(mx.nd.ones((2, 3), ctx=mx.gpu(0))).wait_to_read()
        print("can", name)
    except scratchbn.BackendError as error:
        print("cannot", name, error, sep="\\t")
"""


def known_backends(environment: Mapping[str, str]) -> list[str]:
    """Return the backends that run on a GPU; 'auto' is one of the others."""
    run = subprocess.run(
        [str(house.PYTHON), "-c", _PROBE], cwd=house.REPOSITORY, env=dict(environment),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    lines = [line.split(None, 2) for line in run.stdout.splitlines()]
    for verdict, name, *reason in lines:
        if verdict == "cannot":
            print(f"not rehearsed: backend {name}, {' '.join(reason)}", flush=True)
    return [name for verdict, name, *_ in lines if verdict == "can" and name != "auto"]


def rehearse(
    files: Sequence[str],
    questions: Sequence[checks.Check],
    backends: Sequence[str],
    environment: Mapping[str, str],
    jobs: int,
) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """Run tests and checks under a progress bar; return the rows of the table, and what failed."""
    rows, problems = [], []
    steps = len(backends) * (len(files) + len(questions))
    with tqdm(total=steps, unit="part", disable=not steps) as bar, ThreadPoolExecutor(jobs) as pool:

        def finished(_: object) -> None:
            bar.update()

        def tested_file(testing: Future[suite.Outcome]) -> None:
            bar.update()
            if not testing.exception():
                for broken in testing.result().broken:  # at once: the whole list takes an hour
                    bar.write(f"broken: {' '.join(broken.split())[:300]}")

        asked = [
            (backend, pool.submit(question, checks.Stage(environment, backend)))
            for backend in backends
            for question in questions
        ]
        tested = [
            (backend, pool.submit(suite.run_file, file, backend, environment))
            for backend in backends
            for file in files
        ]
        for _, asking in asked:
            asking.add_done_callback(finished)
        for _, testing in tested:
            testing.add_done_callback(tested_file)
        for backend, future in asked:
            for finding in future.result():
                result = f"{len(finding.problems)} problems" if finding.problems else "ok"
                rows.append((finding.check, backend, result, finding.remark))
                problems += [f"{finding.check} ({backend}): {p}" for p in finding.problems]
        for backend, testing in tested:
            outcome = testing.result()
            result = f"{len(outcome.broken)} broken" if outcome.broken else "ok"
            counted = ", ".join(f"{n} {what}" for what, n in sorted(outcome.counts.items()))
            rows.append((outcome.file, backend, result, counted))
            problems += [f"{broken} ({backend})" for broken in outcome.broken]
    return rows, problems


if __name__ == "__main__":
    sys.exit(main())
