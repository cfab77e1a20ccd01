"""What is measured here: what was asked for, less what cannot run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from .entries import ENTRIES, missing_backend
from .machine import available_memory, cache_sizes
from .nets import LAYOUTS, NETS, Net, single_layer
from .stats import sweep_sizes

_ALIVE = 40  # tensors of a single layer's size that all its entries hold together, at most


def runnable(
    nets: Sequence[str], entries: Collection[str], named: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the nets and entries that can run here, and notes on others that were not `named`."""
    reasons = {n: f"needs {NETS[n].needs}" for n in nets if n in NETS and NETS[n].missing}
    chosen = [name for name in ENTRIES if name in entries]
    reasons |= {name: why for name in chosen if (why := missing_backend(name))}
    for name, reason in reasons.items():
        if name in named:
            raise ValueError(f"{name} cannot run here: {reason}")
    return (
        [name for name in dict.fromkeys(nets) if name not in reasons],
        [name for name in chosen if name not in reasons],
        [f"{name} left out: {reason}" for name, reason in reasons.items()],
    )


def groups(
    names: Sequence[str],
    works: Sequence[str],
    quick: bool,
    notes: list[str],
    batches: Sequence[int] | None = None,
    eager: bool = False,
) -> list[tuple[Net, str]]:
    """Return each net, and each size of a single layer, with each kind of work it has.

    Nets have their own size of batch, or each of `batches`; none is hybridized if `eager`.
    Layers too large for the memory are left out, with a note.
    """
    caches, memory = cache_sizes(), available_memory()
    sizes = sweep_sizes(caches[2], caches[3])[: 1 if quick else None]
    nets = [NETS[name] for name in names if name in NETS]
    if batches:
        nets = [net.with_batch(size) for net in nets for size in batches]
    found = [(net, work) for net in nets for work in works]
    for layer in [single_layer(name, size) for name in names if name in LAYOUTS for size in sizes]:
        if memory < _ALIVE * layer.nbytes:
            notes.append(f"{layer.title} left out: needs {_ALIVE} tensors of memory")
            continue
        found += [(layer, work) for work in works if work != "folded"]
    if eager:
        found = [(replace(net, eager=True), work) for net, work in found if work != "folded"]
    if not found:
        kind = "eager nets" if eager else "single layers"
        why = "; ".join(notes) or f"{kind} have no folded work"
        raise ValueError(f"there is nothing to measure: {why}")
    return found
