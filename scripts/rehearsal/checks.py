"""The questions that a rehearsal answers beside the tests: each runs scenes and reads journals."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .house import PYTHON, REPOSITORY
from .journal import Entry, accesses, between, order_problem, parse, work
from .ptx import float64_problems

# Launches, library calls and copies that a layer adds to a training step, at most.
BOUNDS = {"portable": 99, "native": 8}
_SECONDS = 900
_TF32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH


@dataclass
class Scene:
    """A scene that ran: what it printed, its journal, and the modules that it loaded."""

    title: str
    error: str | None
    found: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)


@dataclass
class Finding:
    """The answer to a question: what is wrong, and what is worth saying."""

    check: str
    problems: list[str]
    remark: str = ""


@dataclass(frozen=True)
class Stage:
    """Runs scenes with a backend, in an environment that has the stand-ins."""

    environment: Mapping[str, str]
    backend: str

    def play(
        self, name: str, dtype: str = "float32", mode: str = "hybrid", numpy: bool = False
    ) -> Scene:
        """Run a scene of ``scenes.py`` in a process of its own."""
        options = ["--backend", self.backend, "--dtype", dtype, "--mode", mode]
        options += ["--numpy"] if numpy else []
        title = f"{name} {dtype} {mode}{' np' if numpy else ''}"
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder, "journal")
            variables = {
                **self.environment,
                "SCRATCHBN_REHEARSAL_JOURNAL": str(journal),
                "SCRATCHBN_REHEARSAL_MODULES": folder,
            }
            error, said = _run([str(PYTHON), "-m", "rehearsal.scenes", name, *options], variables)
            text = journal.read_text("utf-8", "replace") if journal.exists() else ""
            ptx = {file.name: file.read_text("utf-8") for file in Path(folder).glob("*.ptx")}
        return Scene(title, error, {} if error else json.loads(said), parse(text), ptx)


def _run(command: list[str], variables: dict[str, str]) -> tuple[str | None, str]:
    """Return why a process failed, or None, and the last line that it printed."""
    try:
        child = subprocess.run(
            command, cwd=REPOSITORY, env=variables, capture_output=True, text=True,
            errors="replace", timeout=_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not end within {_SECONDS} s", ""
    last = (child.stdout.strip().splitlines() or [""])[-1]
    if child.returncode == 0:
        return None, last
    complaint = (child.stderr.strip().splitlines() or [""])[-1][-300:]
    ended = f"died of signal {-child.returncode}" if child.returncode < 0 else "failed"
    return f"{ended} after {last!r}: {complaint}", ""


def operators(stage: Stage) -> list[Finding]:
    """Every variant of the layer runs; each reads its running statistics before it writes them."""
    broken: list[str] = []
    disordered: list[str] = []
    seen = 0
    for dtype, mode in (
        ("float32", "hybrid"), ("float64", "static_shape"), ("float16", "static_alloc"),
        ("float32", "eager"),
    ):  # fmt: skip
        scene = stage.play("variants", dtype, mode)
        broken += errors_of(scene)
        for name, held in scene.found.items():
            if "error" in held:
                broken.append(f"{name}, {dtype}, {mode}: {held['error']}")
            elif mode != "eager":
                seen += len(held)
                problems = order_problems(scene.entries, name, held)
                disordered += [f"{name}, {dtype}, {mode}: {problem}" for problem in problems]
    return [
        Finding("every variant has operators, types and shapes on a GPU", broken),
        Finding(
            "running statistics are read before they are written, once a call",
            disordered,
            f"{seen} arrays in the journal",
        ),
    ]


def order_problems(entries: list[Entry], name: str, held: Mapping[str, int]) -> list[str]:
    """Say what is wrong with the order of reads and writes in the third step of a variant."""
    calls = 2 if name.endswith("twice") else 1
    forward = between(entries, f"{name}, step 2: forward", f"{name}, step 2: backward")
    found = []
    for array, where in held.items():
        problem = order_problem(accesses(forward, where), writes=calls)
        found += [] if problem is None else [f"{array} is {problem}"]
    return found


def sharing(stage: Stage) -> list[Finding]:
    """Several layers normalize one array."""
    scenes = [stage.play("shared", mode=mode) for mode in ("hybrid", "static_shape")]
    problems = [p for scene in scenes for p in errors_of(scene)]
    for scene in scenes:
        problems += [f"{scene.title}, {k}: {said}" for k, said in scene.found.items()]
    return [Finding("two and three layers on one array in a hybridized net", problems)]


def float64(stage: Stage) -> list[Finding]:
    """Look for float32 in what NVRTC was given of float64 nets."""
    scene = stage.play("variants", "float64", "hybrid")
    problems = errors_of(scene)
    for name, ptx in scene.modules.items():
        title = _kernel_of(ptx) or name
        problems += [f"{title}: {problem}" for problem in float64_problems(ptx)]
    remark = f"{len(scene.modules)} modules of PTX"
    return [Finding("float64 is computed in float64", list(dict.fromkeys(problems)), remark)]


def tf32(stage: Stage) -> list[Finding]:
    """No product lets the card round float32 to 11 bits."""
    problems: list[str] = []
    products = 0
    for mode, numpy in (("hybrid", False), ("hybrid", True), ("eager", True)):
        scene = stage.play("products", mode=mode, numpy=numpy)
        called = [e for e in scene.entries if e.kind == "CALL" and e.name.startswith("cublas")]
        products += len(called)
        rounded = Counter(e.name for e in called if e.detail("mode") == _TF32)
        problems += errors_of(scene)
        problems += [f"{scene.title}: {n} x {name} with TF32" for name, n in rounded.items()]
    return [Finding("float32 products are not rounded to TF32", problems, f"{products} products")]


def emptiness(stage: Stage) -> list[Finding]:
    """Batches without elements are trained on."""
    scenes = [
        stage.play("empty", mode=mode, numpy=True) for mode in ("hybrid", "static_alloc", "eager")
    ]
    problems = [p for scene in scenes for p in errors_of(scene)]
    return [Finding("empty batches with np_shape", problems)]


def training(stage: Stage) -> list[Finding]:
    """LeNet is trained for three steps."""
    scenes = [stage.play("lenet", mode=mode) for mode in ("static_shape", "eager")]
    problems = [p for scene in scenes for p in errors_of(scene)]
    remark = ""
    if not problems:
        count = len(work(between(scenes[0].entries, "step 2", "step 2: end")))
        remark = f"{count} launches in a step, hybridized, Trainer included"
    return [Finding("LeNet trains, hybridized and eager", problems, remark)]


def launches(stage: Stage) -> list[Finding]:
    """How many launches, library calls and copies a layer more in a net adds to a step."""
    scene = stage.play("launches", mode="static_shape")
    problems, said = errors_of(scene), []
    for layout in scene.found:
        parts = []
        for kind in ("ours", "built-in"):
            nets = [works_of_step(scene.entries, f"{n} x {kind}, {layout}, step 2") for n in (2, 3)]
            forward, backward = (added(*pair) for pair in zip(*nets))
            parts.append(f"{kind} {len(forward)} + {len(backward)}")
            bound, count = BOUNDS.get(stage.backend), len(forward) + len(backward)
            if kind == "ours" and bound is not None and count > bound:
                listed = "; ".join(entry.short() for entry in forward + backward)
                problems.append(f"{layout}: {count} launches, the bound is {bound}: {listed}")
        said.append(f"{layout}: {', '.join(parts)}")
    return [Finding("launches that a layer adds, forward + backward", problems, "; ".join(said))]


def works_of_step(entries: list[Entry], step: str) -> tuple[list[Entry], list[Entry]]:
    """Return what a card executes in the forward and in the backward of a step."""
    marks = [f"{step}: {part}" for part in ("forward", "backward", "end")]
    forward, backward = (work(between(entries, *marks[i : i + 2])) for i in (0, 1))
    return forward, backward


def added(fewer: list[Entry], more: list[Entry]) -> list[Entry]:
    """Return what is in the second list and has no equal in the first, whatever the arrays."""
    before = Counter(entry.short() for entry in fewer)
    found = []
    for entry in more:
        if before[entry.short()]:
            before[entry.short()] -= 1
        else:
            found.append(entry)
    return found


def errors_of(scene: Scene) -> list[str]:
    """Say what broke in a scene: its process, launches that a card refuses, missing stand-ins."""
    problems = [] if scene.error is None else [f"{scene.title} {scene.error}"]
    for kind, said in (
        ("REFUSED", "launched with no blocks"),
        ("MISSING", "has no stand-in"),
    ):
        counts = Counter(entry.name for entry in scene.entries if entry.kind == kind)
        problems += [f"{scene.title}: {name} {said}, {n} times" for name, n in counts.items()]
    return problems


def _kernel_of(ptx: str) -> str:
    names = [line for line in ptx.splitlines() if ".entry" in line]
    return names[0].split(".entry")[1].strip(" (")[:90] if names else ""


Check = Callable[[Stage], list[Finding]]
CHECKS: tuple[Check, ...] = (operators, sharing, float64, tf32, emptiness, training, launches)
