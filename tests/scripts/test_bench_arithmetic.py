"""Ratios, intervals, memory floors and samples of the benchmark."""

from __future__ import annotations

import math

import numpy as np
import psutil
import pytest
from bench import stats
from bench.machine import available_memory, cache_sizes
from bench.rounds import Effort, take_samples
from bench.runner import Seconds


def test_ratio_is_that_of_medians():
    interval = stats.ratio_of_medians([1, 2, 30], [4, 4, 5])
    assert interval.value == 0.5
    assert 0.2 <= interval.low <= interval.value <= interval.high <= 7.5


def test_ratio_of_proportional_times_has_no_spread(rng):
    times = rng.uniform(1, 5, 40)
    # Paired by round: what slows both down cancels, however much the rounds differ.
    interval = stats.ratio_of_medians(3 * times, times)
    np.testing.assert_allclose(interval, (3, 3, 3), rtol=1e-12)


def test_unpaired_times_spread(rng):
    times = rng.uniform(1, 5, 40)
    interval = stats.ratio_of_medians(3 * times, rng.permutation(times))
    assert interval.low < 2.8 < 3.2 < interval.high


def test_interval_covers_the_true_ratio_as_often_as_it_says(rng):
    covered = 0
    for _ in range(200):
        above, below = 1.3 * rng.lognormal(0, 0.2, 25), rng.lognormal(0, 0.2, 25)
        interval = stats.ratio_of_medians(above, below)
        covered += interval.low <= 1.3 <= interval.high
    assert 180 <= covered <= 199  # about 95% of 200; the bootstrap of a median is a little wide


def test_interval_is_reproducible(rng):
    times, reference = rng.uniform(1, 2, (2, 40))  # of few, two draws may share their bounds
    first = stats.ratio_of_medians(times, reference)
    assert first == stats.ratio_of_medians(times, reference)
    assert first != stats.ratio_of_medians(times, reference, seed=1)


@pytest.mark.parametrize(
    "times, reference, said",
    [
        ([], [], "shapes"),
        ([1, 2], [1], "shapes"),
        ([1, 0], [1, 1], "times must be positive"),
        ([1, 1], [1, math.nan], "reference must be positive"),
        ([1, math.inf], [1, 1], "times must be positive"),
    ],
)
def test_ratio_of_unusable_times(times, reference, said):
    with pytest.raises(ValueError, match=said):
        stats.ratio_of_medians(times, reference)


def test_interval_in_words():
    assert str(stats.Interval(0.914, 0.9, 0.93)) == "0.91 [0.90, 0.93]"
    assert str(stats.Interval(12.34, 11.0, 13.0)) == "12.3 [11.0, 13.0]"
    assert stats.Interval(2, 1, 3).scaled(0.5) == (1, 0.5, 1.5)


def floor_seconds(work, nbytes, bytes_per_second):
    """How long memory alone needs for a norm layer on a tensor of `nbytes`."""
    return stats.FLOOR_PASSES[work] * nbytes / bytes_per_second


def test_floor():
    # 100 MB copied in 20 ms: 200 MB moved, 10 GB/s.
    assert stats.bandwidth(100_000_000, 0.02) == pytest.approx(1e10)
    assert floor_seconds("train", 100_000_000, 1e10) == pytest.approx(0.08)
    assert floor_seconds("inference", 100_000_000, 1e10) == pytest.approx(0.02)


@pytest.mark.parametrize("work", ["train", "inference"])
def test_floor_multiple_agrees_with_the_floor(work):
    nbytes, copies, times = 1 << 20, [2e-4, 1e-4, 4e-4], [5e-3, 3e-3, 9e-3]
    floor = floor_seconds(work, nbytes, stats.bandwidth(nbytes, 2e-4))
    assert stats.floor_multiple(work, times, copies).value == pytest.approx(5e-3 / floor)


def test_folded_work_has_no_floor():
    with pytest.raises(ValueError, match="work must be one of train, inference, got 'folded'"):
        stats.floor_multiple("folded", [1.0], [1.0])


def test_cache_sizes(tmp_path):
    for index, (level, size) in enumerate([("1", "48K"), ("2", "1024K"), ("3", "24M"), ("4", "?")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_sizes(tmp_path) == {2: 2**20, 3: 24 * 2**20}


def test_cache_sizes_where_nothing_tells_them(tmp_path):
    assert cache_sizes(tmp_path / "nowhere") == {2: 2**20, 3: 2**25}


def test_available_memory(tmp_path, monkeypatch):
    others = ("MemTotal", "MemFree", "Buffers", "Cached", "Shmem", "Active", "Inactive")
    sizes = {**dict.fromkeys(others, 9), "MemAvailable": 7}
    text = "".join(f"{name}: {size} kB\n" for name, size in sizes.items())
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert available_memory() == 7 * 1024


def test_sweep_goes_from_level_2_to_ten_times_level_3():
    assert stats.sweep_sizes(2**20, 2**24) == [2**20, 2**22, 2**24, 10 * 2**24]


def test_every_sampler_runs_once_a_round_in_an_order_that_changes():
    called = []

    def sampler(name, seconds):
        def run(steps):
            called.append((name, steps))
            return Seconds(seconds * steps, 2 * seconds * steps)

        return run

    samplers = {"slow": sampler("slow", 0.5), "fast": sampler("fast", 0.03)}
    steps, samples = take_samples(samplers, Effort(1, 12, 0.1))
    assert steps == {"slow": 1, "fast": 4}  # as many as fill 0.1 s
    np.testing.assert_allclose(samples["slow"], [(0.5, 1.0)] * 12)
    np.testing.assert_allclose(samples["fast"], [(0.03, 0.06)] * 12)
    timed = [call for call in called[4:] if call != ("fast", 1)]  # one step before, not counted
    assert called[4:].count(("fast", 1)) == 12
    pairs = {tuple(timed[i : i + 2]) for i in range(0, len(timed), 2)}
    assert pairs == {(("slow", 1), ("fast", 4)), (("fast", 4), ("slow", 1))}


@pytest.mark.parametrize("once, rounds", [(0.1, 20), (100.0, 5), (1e-4, 200)])
def test_rounds_fill_the_seconds_within_bounds(once, rounds):
    effort = Effort(seconds=2.0, rounds=None, sample_seconds=1e-4)
    _, samples = take_samples({"one": lambda steps: Seconds(once * steps, 1.0)}, effort)
    assert len(samples["one"]) == rounds


def test_nothing_to_sample():
    assert take_samples({}, Effort(1, None, 1)) == ({}, {})
