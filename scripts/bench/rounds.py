"""How samples are taken: everything alive together, in another random order every round."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .runner import Sampler, Seconds

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 200


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds or rounds for a group, and the least seconds of a sample."""

    seconds: float
    rounds: int | None
    sample_seconds: float


def take_samples(
    samplers: Mapping[str, Sampler], effort: Effort, title: str = ""
) -> tuple[dict[str, int], dict[str, list[Seconds]]]:
    """Time samplers in turn; return the steps in a sample of each, and seconds per step by round.

    A sample has as many steps as take ``effort.sample_seconds``.
    """
    if not samplers:
        return {}, {}
    first = {name: min(sampler(1).wall for _ in range(2)) for name, sampler in samplers.items()}
    steps = {name: math.ceil(effort.sample_seconds / once) for name, once in first.items()}
    # What ran before leaves caches and threads in some state: a step between, unless it is long.
    between = {name: 1 if count > 1 else 0 for name, count in steps.items()}
    round_seconds = sum(once * (steps[name] + between[name]) for name, once in first.items())
    fitting = round(effort.seconds / round_seconds)
    rounds = effort.rounds or min(max(fitting, _LEAST_ROUNDS), _MOST_ROUNDS)
    samples: dict[str, list[Seconds]] = {name: [] for name in samplers}
    rng = np.random.default_rng(0)
    names = list(samplers)
    bar = tqdm(total=rounds, desc=title, unit="round", leave=False, disable=None)
    with _no_garbage_collection(), bar:
        for _ in range(rounds):
            for i in rng.permutation(len(names)):
                name = names[i]
                if between[name]:
                    samplers[name](between[name])
                together = samplers[name](steps[name])
                samples[name].append(Seconds(*(t / steps[name] for t in together)))
            bar.update()
    return steps, samples


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
