"""What ``scratchbn doctor`` says of the facts: what is amiss and a verdict, or everything."""

from __future__ import annotations

from typing import Any

from .._text import rich_table, table, within

_VERDICTS = {
    True: "the wheel has code for it",
    False: "the wheel has no code for it",
    None: "not known whether this mxnet has code for it",
}

Section = tuple[str, "list[tuple[str, str]]"]


def verdict(facts: dict[str, Any]) -> str:
    """Return in a sentence whether it works, and with what."""
    mxnet = facts["mxnet"]
    python = f"Python {facts['python']['version']}, numpy {facts['numpy']}"
    if mxnet["error"] is not None:
        return f"does not work: mxnet cannot be imported ({python})"
    version = facts["scratchbn"]
    device, backend = facts["device"]["auto"], facts["backend"]
    kind = backend["gpu"]["auto"] if device.startswith("gpu") else backend["auto"]
    kernel = {"native": "the compiled kernel", "portable": "stock operators"}[kind]
    return (
        f"works: scratchbn{f' {version}' if version else ''} with mxnet {mxnet['version']} on "
        f"{device}, {kernel}; {python}"
    )


def folded(facts: dict[str, Any], width: int | None = None) -> str:
    """Lay out what is not as it could be, how much else there is, and the verdict.

    Lines are at most `width` long, but for words that are longer themselves.
    """
    every = sum(len(rows) for _, rows in _sections(facts))
    rows = _amiss(facts)
    lines = [within(rows, width)] if rows else []
    fine = every - len(rows)
    lines += [within([("", f"{fine} more facts: doctor --all")], width)]
    return "\n".join([*lines, within([("", verdict(facts))], width)])


def text(facts: dict[str, Any]) -> str:
    """Lay out the facts as plain text: titles, and below each its names and values."""
    lines = []
    for title, rows in _sections(facts):
        lines += [(title, ""), *((f"  {name}", value) for name, value in rows)]
    return f"{table(lines[0], lines[1:])}\n{verdict(facts)}"


def rich_tables(facts: dict[str, Any]) -> list[Any]:
    """Lay out the facts for a terminal, as a ``rich.table.Table`` for each title."""
    sections = _sections(facts)
    width = max(len(name) for _, rows in sections for name, _ in rows)
    tables = [rich_table(title, ("", ""), rows) for title, rows in sections]
    for drawn in tables:
        drawn.box, drawn.show_header, drawn.title_style = None, False, "bold"
        drawn.columns[0].style, drawn.columns[0].min_width = "cyan", width
    return tables


def _sections(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Lay out the facts as titled lists of (name, value); what has no value is left out."""
    python, system, mxnet = facts["python"], facts["platform"], facts["mxnet"]
    cuda, device, backend = facts["cuda"], facts["device"], facts["backend"]
    features, libraries = mxnet["features"], cuda["libraries"].items()
    distributions = mxnet["distributions"].items()
    sections: dict[str, dict[str, Any]] = {
        "System": {
            "scratchbn": facts["scratchbn"] or "not installed, run from its source tree",
            "Python": f"{python['version']}  {python['executable']}",
            "platform": system["system"],
            "CPUs": str(system["cpus"]),
            "numpy": facts["numpy"],
            **facts["environment"],
        },
        "mxnet": {
            "distribution": ", ".join(f"{k} {v}" for k, v in distributions) or "none",
            "import": mxnet["error"] or f"works, {mxnet['version']}  {mxnet['path']}",
            "built with": " ".join(name for name, on in features.items() if on) or "unknown",
            "without": " ".join(name for name, on in features.items() if not on),
        },
        "CUDA": {
            "driver": cuda["problem"] or f"supports CUDA {cuda['driver_supports']}",
            **{f"gpu({gpu['index']})": _gpu_text(gpu) for gpu in cuda["gpus"]},
            **{k: f"{v['version'] or 'version unknown'}  {v['path']}" for k, v in libraries},
            "libraries": "" if libraries else "none from nvidia-*-cu11",
        },
        "Device": {"auto": f"{device['auto']}: {device['because']}" if device else "unknown"},
        "Backend": {
            "chosen": backend["chosen"],
            "auto on a CPU": backend["auto"],
            **{f"  {where}": meaning for where, meaning in backend["auto_means"].items()},
            "auto on a GPU": _reasoned(backend["gpu"]["auto"], backend["gpu"]["problem"]),
            "kernel": backend["problem"] or backend["library"],
            **{
                f"for capability {capability}": path or "compiled at first use, some seconds"
                for capability, path in backend["gpu"]["code"].items()
            },
            "NVRTC": backend["gpu"]["nvrtc"] or "none found",
            "compiler": backend["compiler"] or "none found",
        },
        "Optional packages": {k: v or "not installed" for k, v in facts["packages"].items()},
        "Data": facts["data"],
    }
    laid = [(title, [row for row in rows.items() if row[1]]) for title, rows in sections.items()]
    advice = [("!", line) for line in facts["advice"]]
    return [*laid, ("Advice", advice)] if advice else laid


def _reasoned(choice: str, problem: str | None) -> str:
    return choice if problem is None else f"{choice}: {problem}"


def _gpu_text(gpu: dict[str, Any]) -> str:
    verdict = _VERDICTS[gpu["wheel_runs"]]
    return f"{gpu['name']}, compute capability {gpu['capability']}, {verdict}"


def _amiss(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is missing, does not work, or was set by the user, as rows."""
    backend, mxnet = facts["backend"], facts["mxnet"]
    missing = [name for name, version in facts["packages"].items() if version is None]
    unfound = {k: v for k, v in facts["data"].items() if v.startswith(("not found", "unusable"))}
    absent = [name for name, text in unfound.items() if text.startswith("not found")]
    rows = {
        "mxnet": mxnet["error"],
        "kernel": backend["problem"] if mxnet["error"] is None else None,
        **facts["environment"],
        "packages": f"{', '.join(missing)} not installed" if missing else None,
        "data": f"{', '.join(absent)} not on this machine" if absent else None,
        **{f"data {k}": v for k, v in unfound.items() if k not in absent},
    }
    return [*filter(lambda row: row[1], rows.items()), *(("!", line) for line in facts["advice"])]
