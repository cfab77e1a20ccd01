"""A pytest plugin: writes down each test's start, and its end with why it failed, as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from .classify import NUMBERS, classify

RESULTS, DONE = "SCRATCHBN_REHEARSAL_RESULTS", "SCRATCHBN_REHEARSAL_DONE"


def _write(**fields: Any) -> None:
    with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_sessionstart() -> None:
    """Let hypothesis not look for the simplest of the examples whose numbers are wrong."""
    chosen = hypothesis.settings()
    kept = [phase for phase in chosen.phases if phase.name not in ("shrink", "explain")]
    hypothesis.settings.register_profile("rehearsal", chosen, phases=kept)
    hypothesis.settings.load_profile("rehearsal")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests that ran before the process died."""
    done = os.environ.get(DONE)
    before = set(json.loads(Path(done).read_text("utf-8"))) if done else set()
    left_out = [item for item in items if item.nodeid in before]
    if left_out:
        items[:] = [item for item in items if item.nodeid not in before]
        config.hook.pytest_deselected(items=left_out)
    _write(collected=len(items))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write which test begins: it is the last one if the process dies."""
    _write(test=nodeid, outcome="started")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, None]:
    """Write how a test, or its setting up or tearing down, ended."""
    report = (yield).get_result()
    if report.skipped:
        _write(test=item.nodeid, outcome="skipped")
    elif report.passed:
        if call.when == "call":
            _write(test=item.nodeid, outcome="passed")
    elif call.excinfo is None:  # a test that was expected to fail
        _write(test=item.nodeid, outcome="numbers", error="passed", said=str(report.longrepr))
    else:
        error = call.excinfo.value
        statement = str(call.excinfo.traceback[-1].statement) if call.excinfo.traceback else ""
        verdict = classify(error, statement)
        if item.get_closest_marker("values") and isinstance(error, pytest.fail.Exception):
            verdict = NUMBERS  # it waits for an error that wrong values do not cause
        _write(
            test=item.nodeid,
            outcome=verdict,
            error=call.excinfo.typename,
            said=str(error)[-2000:],
            statement=statement.strip()[:300],
        )
