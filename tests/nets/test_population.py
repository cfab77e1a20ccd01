"""Statistics of data in parts, against NumPy on the concatenated data."""

from scratchbn.population import CumulativeAverage, Population

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

both = pytest.mark.parametrize("accumulator", [Population, CumulativeAverage])
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def parts_of(sizes, mean=0.0, seed=0, channels=3):
    """Parts of random data, shape (size, channels)."""
    data = np.random.default_rng(seed).normal(mean, 2, (sum(sizes), channels))
    return np.split(data, np.cumsum(sizes)[:-1])


def gathered(accumulator, parts, **options):
    found = accumulator(**options)
    for part in parts:
        found.add(len(part), part.mean(axis=0), part.var(axis=0))
    return found


@given(
    sizes=sizes,
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 2**16),
    unbiased=st.booleans(),
)
def test_equals_numpy_on_the_concatenated_data(sizes, mean, seed, unbiased):
    parts = parts_of([*sizes, 2], mean, seed)
    data = np.concatenate(parts)
    found = gathered(Population, parts, unbiased=unbiased)
    assert (found.count, found.calls) == (len(data), len(parts))
    actual = found.statistics()
    np.testing.assert_allclose(actual[0], data.mean(axis=0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(actual[1], data.var(axis=0, ddof=unbiased), rtol=1e-10, atol=1e-13)
    assert [values.dtype for values in actual] == [np.float64] * 2


@given(sizes=sizes, seed=st.integers(0, 2**16))
def test_the_order_of_the_parts_does_not_matter(sizes, seed):
    parts = parts_of(sizes, seed=seed)
    for actual, expected in zip(
        gathered(Population, parts[::-1]).statistics(), gathered(Population, parts).statistics()
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_many_parts_of_one_element():
    parts = parts_of([1] * 1000)
    for actual, expected in zip(
        gathered(Population, parts).statistics(),
        gathered(Population, [np.vstack(parts)]).statistics(),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_a_large_mean_costs_no_digits():
    parts = parts_of([300, 7, 50], mean=1e8)
    _, variance = gathered(Population, parts).statistics()
    np.testing.assert_allclose(variance, np.concatenate(parts).var(axis=0), rtol=1e-8)


@both
def test_float32_parts_are_gathered_in_float64(accumulator):
    found = accumulator()
    for mean in (1, 2**-20):
        found.add(1, np.float32([mean]), np.float32([0]))
    np.testing.assert_array_equal(found.statistics()[0], [(1 + 2**-20) / 2])


@both
def test_what_was_added_may_change_afterwards(accumulator):
    mean, variance = np.ones(2), np.ones(2)
    found = accumulator()
    found.add(3, mean, variance)
    mean[:] = variance[:] = 7
    np.testing.assert_array_equal(found.statistics(), np.ones((2, 2)))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_shows(value):
    found = Population()
    with np.errstate(invalid="ignore"):
        found.add(2, np.array([value, 1]), np.array([1.0, 1]))
        found.add(2, np.array([1.0, 1]), np.array([1.0, 1]))
        mean, variance = found.statistics()
    assert (np.isfinite(mean) == [False, True]).all()
    assert (np.isfinite(variance) == [False, True]).all()


def test_parts_weigh_the_same_in_the_cumulative_average():
    parts = parts_of([5, 1, 2])
    found = gathered(CumulativeAverage, parts)
    assert found.calls == 3
    expected = np.mean([(part.mean(axis=0), part.var(axis=0)) for part in parts], axis=0)
    np.testing.assert_allclose(found.statistics(), expected, rtol=1e-12, atol=1e-14)


def test_the_cumulative_average_passes_over_parts_without_an_unbiased_variance():
    parts = parts_of([5, 1, 2])
    found = gathered(CumulativeAverage, parts, unbiased=True)
    assert found.calls == 2
    kept = (parts[0], parts[2])
    expected = np.mean([(part.mean(axis=0), part.var(axis=0, ddof=1)) for part in kept], axis=0)
    np.testing.assert_allclose(found.statistics(), expected, rtol=1e-12, atol=1e-14)


@both
def test_one_element_has_no_unbiased_variance(accumulator):
    found = gathered(accumulator, parts_of([1]), unbiased=True)
    with pytest.raises(ValueError, match="at least 2 elements per channel for unbiased_variance"):
        found.statistics()


@both
@pytest.mark.parametrize("unbiased", [False, True])
def test_nothing_has_no_statistics(accumulator, unbiased):
    with pytest.raises(ValueError, match="at least 1 element per channel, got 0"):
        accumulator(unbiased).statistics()


@both
@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ValueError, "count must be at least 1, got 0"),
        (1.5, TypeError, "count must be an integer, got 1.5"),
        (True, TypeError, "count must be an integer, got True"),
    ],
)
def test_bad_counts(accumulator, count, error, message):
    found = accumulator()
    with pytest.raises(error, match=message):
        found.add(count, np.zeros(2), np.zeros(2))
    assert found.calls == 0
