"""Mean and variance of data that comes in parts, in NumPy alone."""

from __future__ import annotations

import numpy as np

from ._checks import check_integer

__all__ = ["CumulativeAverage", "Population"]


class Population:
    r"""Mean and variance of all elements in all parts, by the law of total variance.

    .. math:: \mu = \frac{1}{M} \sum_b m_b \mu_b, \qquad
              \sigma^2 = \frac{1}{M} \sum_b m_b \sigma_b^2
                       + \frac{1}{M} \sum_b m_b (\mu_b - \mu)^2, \qquad M = \sum_b m_b

    for parts b of :math:`m_b` elements: the mean of the variances plus the variance of the means.
    How the elements are divided into parts does not matter. Everything is computed in float64, part
    by part, without subtracting large squares: a large mean costs no digits.

    Parameters
    ----------
    unbiased : bool, default False
        Whether the variance is the unbiased one, M / (M - 1) times the above.

    Attributes
    ----------
    count : int
        How many elements per channel there are in all parts, M.
    calls : int
        How many parts there are.

    Examples
    --------
    >>> import numpy as np
    >>> parts = Population()
    >>> for part in np.array([[1.0, 7.0]]), np.array([[3.0, 4.0], [5.0, 10.0]]):
    ...     parts.add(len(part), part.mean(axis=0), part.var(axis=0))
    >>> mean, variance = parts.statistics()
    >>> print(mean, variance.round(4))
    [3. 7.] [2.6667 6.    ]
    >>> print(np.var([[1, 7], [3, 4], [5, 10]], axis=0).round(4))
    [2.6667 6.    ]
    """

    def __init__(self, unbiased: bool = False) -> None:
        self.count = 0
        self.calls = 0
        self._unbiased = unbiased
        self._mean = self._variance = np.zeros(())

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        """Add a part.

        Parameters
        ----------
        count : int
            How many elements each channel has in this part.
        mean, variance : array, shape (C,)
            Their mean and biased variance.

        Raises
        ------
        TypeError, ValueError
            If `count` is not an integer of at least 1.
        """
        share = check_integer("count", count, least=1) / (self.count + count)
        distance = np.asarray(mean, np.float64) - self._mean
        within = (1 - share) * self._variance + share * np.asarray(variance, np.float64)
        self._variance = within + share * (1 - share) * distance**2
        self._mean = self._mean + share * distance
        self.count += count
        self.calls += 1

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the variance, each of shape (C,) and float64.

        Raises
        ------
        ValueError
            If there is no part, or the variance is to be unbiased and there is one element.
        """
        _check_enough(self.count, self._unbiased)
        factor = self.count / (self.count - 1) if self._unbiased else 1
        return self._mean, self._variance * factor


class CumulativeAverage:
    """The plain average of the means and variances of the parts; each part counts the same.

    This is what training with ``momentum=None`` keeps. The variance of the means is left out.

    Parameters
    ----------
    unbiased : bool, default False
        Whether to average unbiased variances. A part of one element has none, and is passed over.

    Attributes
    ----------
    calls : int
        How many parts the average is of.

    Examples
    --------
    >>> import numpy as np
    >>> parts = CumulativeAverage()
    >>> parts.add(1, np.array([1.0]), np.array([0.0]))
    >>> parts.add(2, np.array([4.0]), np.array([1.0]))
    >>> print(*parts.statistics())
    [2.5] [0.5]
    """

    def __init__(self, unbiased: bool = False) -> None:
        self.calls = 0
        self._largest = 0
        self._unbiased = unbiased
        self._mean = self._variance = np.zeros(())

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        """Add a part; see :meth:`Population.add`."""
        self._largest = max(self._largest, check_integer("count", count, least=1))
        if self._unbiased and count < 2:
            return
        factor = count / (count - 1) if self._unbiased else 1
        self.calls += 1
        for_mean = np.asarray(mean, np.float64) - self._mean
        for_variance = np.asarray(variance, np.float64) * factor - self._variance
        self._mean = self._mean + for_mean / self.calls
        self._variance = self._variance + for_variance / self.calls

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return both averages; see :meth:`Population.statistics`."""
        _check_enough(self._largest, self._unbiased)
        return self._mean, self._variance


def _check_enough(count: int, unbiased: bool) -> None:
    if unbiased and count == 1:
        raise ValueError(
            "data must have at least 2 elements per channel for unbiased_variance=True, got 1"
        )
    if count == 0:
        raise ValueError("data must have at least 1 element per channel, got 0")
