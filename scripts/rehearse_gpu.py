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
from concurrent.futures import ThreadPoolExecutor
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
    parser.add_argument(
        "--backend", action="append", help="default: portable, and cuda where it is known"
    )
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
    backends = options.backend or known_backends(environment)
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


def known_backends(environment: Mapping[str, str]) -> list[str]:
    """Return the backends that run on a GPU and can be had: portable, and others if there are."""
    code = (
        "import scratchbn.backends as b\n"
        "for name in b.BACKENDS:\n"
        "    try:\n"
        "        if name not in ('auto', 'native'): b.set_backend(name); print(name)\n"
        "    except b.BackendError as error: print(name, error, file=__import__('sys').stderr)"
    )
    run = subprocess.run(
        [house.PYTHON, "-c", code], cwd=house.REPOSITORY, env=dict(environment),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return run.stdout.split()


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
            testing.add_done_callback(finished)
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
