"""Run test files on the rehearsal's GPU, each in a process of its own, and sort what failed."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .classify import BROKEN
from .house import PYTHON, REPOSITORY
from .recorder import DONE, RESULTS

# The contract, conversion of nets and files, recalibration, nets of the zoo, LeNet.
PATTERNS = ("contract/test_*.py", "*/test_convert_*.py", "*/test_recalibrate_*.py", "zoo/test_*.py")
TESTS = tuple(
    str(path.relative_to(REPOSITORY))
    for pattern in PATTERNS
    for path in sorted((REPOSITORY / "tests").glob(pattern))
)
_RESTARTS = 10
_SECONDS = 1800


@dataclass
class Outcome:
    """What became of a test file: how many tests ended how, and what broke."""

    file: str
    backend: str
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def run_file(file: str, backend: str, environment: Mapping[str, str]) -> Outcome:
    """Run a file's tests; a process that dies is started again with the tests that are left."""
    outcome = Outcome(file, backend)
    with tempfile.TemporaryDirectory() as folder:
        results, done = Path(folder, "results"), Path(folder, "done")
        finished: dict[str, dict[str, Any]] = {}
        for _ in range(1 + _RESTARTS):
            results.write_text("")
            done.write_text(json.dumps(list(finished)))
            variables = {**environment, RESULTS: str(results), DONE: str(done)}
            status, said = _pytest(file, backend, variables)
            ended = _ended(results.read_text("utf-8"))
            finished |= ended
            died = [test for test, row in ended.items() if row["outcome"] == "died"]
            for test in died:
                ended[test]["said"] = f"the process died ({status}): {said}"
            if not died:
                break
        if status not in (0, 1, 5) and not died:  # 1: tests failed; 5: none was left
            outcome.broken.append(f"{file}: pytest ended with status {status}: {said}")
    for test, row in finished.items():
        outcome.counts[row["outcome"]] += 1
        if row["outcome"] in (BROKEN, "died"):
            said = " ".join(filter(None, (row.get("error"), row["said"])))
            outcome.broken.append(f"{test}: {said}")
    return outcome


def _pytest(file: str, backend: str, variables: Mapping[str, str]) -> tuple[int, str]:
    options = ["-q", "--tb=no", "-rN", "-p", "no:cacheprovider", "-p", "rehearsal.recorder"]
    chosen = ["--device", "gpu", "--backend", backend]
    command = [str(PYTHON), "-X", "faulthandler", "-m", "pytest", *options, *chosen, file]
    try:
        child = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=dict(variables),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return -1, f"did not end within {_SECONDS} s"
    lines = (child.stderr.strip() or child.stdout.strip()).splitlines()
    return child.returncode, " / ".join(lines[:3])[:300]


def _ended(text: str) -> dict[str, dict[str, Any]]:
    """Return how each test ended, by name; one that only began died with the process.

    A test that failed counts as failed whatever comes after, such as its tearing down.
    """
    ended: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, text.splitlines()):
        if "test" not in row:
            continue
        before = ended.get(row["test"], {}).get("outcome")
        if row["outcome"] == "started":
            row = {**row, "outcome": "died", "said": ""}
        if before in (None, "died", "passed", "skipped") or row["outcome"] == BROKEN:
            ended[row["test"]] = row
    return ended
