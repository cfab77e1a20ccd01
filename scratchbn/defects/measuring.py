"""What the measurements have in common: data, errors, and sentences about them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mxnet as mx
import numpy as np

from .._text import first_line
from .case import Outcome


def _shortened(text: str, most: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def complaint(action: Callable[[], Any]) -> str | None:
    """Run `action`; return the essential line of the exception it raised, or None."""
    try:
        action()
        mx.nd.waitall()
    except (mx.MXNetError, TypeError, ValueError) as error:
        line = re.sub(r" in node \S+", "", first_line(error)).rstrip(": ")
        line = line[line.index("Check failed") :] if "Check failed" in line else line
        return f"{type(error).__name__}: {_shortened(line)}"
    return None


def statistics(layer: Any) -> list[np.ndarray]:
    """Return the running mean and the running variance in float64."""
    mx.nd.waitall()
    return [p.data().asnumpy().astype(np.float64) for p in (layer.running_mean, layer.running_var)]


def off(actual: Any, exact: Any) -> float:
    """Return the largest difference over the largest exact value; infinite where one is NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(actual, np.float64) - exact)
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max() / np.abs(exact).max())


def percent(fraction: float) -> str:
    """Write a fraction with two digits."""
    rounded = float(f"{100 * fraction:.2g}")
    return f"{rounded:,.0f}%" if rounded >= 10 else f"{rounded:.2g}%"


def numbers(values: Any) -> str:
    """Write numbers with four digits."""
    return "[" + ", ".join(f"{value:.4g}" for value in np.ravel(values)) + "]"


def moved_mean(layer: Any, exact: np.ndarray) -> Outcome:
    """Judge a measurement after which the running mean should be `exact`; fresh layers have 0."""
    mean = statistics(layer)[0]
    text = f"running mean {mean[0]:.3f}, exact {exact[0]:.3f}"
    return Outcome(off(mean, exact) < 1e-6, off(mean, exact) > 0.05, text)


def unpoisoned(layer: Any, also: str = "") -> Outcome:
    """Judge a measurement in which a bad batch should leave fresh statistics as they are."""
    mean, var = statistics(layer)
    same = bool((mean == 0).all() and (var == 1).all())
    poisoned = not (np.isfinite(mean).all() and np.isfinite(var).all())
    text = f"running mean {numbers(mean)}, variance {numbers(var)}{also}"
    return Outcome(same, poisoned, text)


@contextmanager
def numpy_semantics(*, shape: bool = True, array: bool = True) -> Iterator[None]:
    """Switch MXNet to NumPy's shapes, and to its arrays."""
    before = {"shape": mx.util.is_np_shape(), "array": mx.util.is_np_array()}
    mx.npx.set_np(shape=shape, array=array)
    try:
        yield
    finally:
        mx.npx.set_np(**before) if before["shape"] else mx.npx.reset_np()


@functools.lru_cache(maxsize=4)
def batch(
    shape: tuple[int, ...] = (8, 3, 4, 4), mean: float = 3.0, std: float = 2.0, seed: int = 0
) -> np.ndarray:
    """Return normally distributed data, which must not be written to."""
    values = np.random.default_rng(seed).normal(mean, std, shape)
    values.flags.writeable = False
    return values
