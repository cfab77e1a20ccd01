"""The oracle for batches with padding: it is batch normalization of the positions that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .oracle import OracleBatchNorm, Step

__all__ = ["masked_infer_step", "masked_train_step"]


def masked_train_step(
    oracle: OracleBatchNorm, x: np.ndarray, dy: np.ndarray, mask: np.ndarray
) -> Step:
    """Take a training call and its backward; the running statistics of the oracle move.

    Parameters
    ----------
    oracle : OracleBatchNorm
    x, dy : numpy.ndarray
        The data, and the gradient of the output.
    mask : numpy.ndarray
        0 where `x` is padding; of `x`'s shape without the oracle's axis.

    Returns
    -------
    Step
        `y` and `dx` are 0 in padded positions.

    Examples
    --------
    >>> oracle = OracleBatchNorm.fresh(1, momentum=0.0)
    >>> x = np.array([[[1.0, 3.0, 70.0]]])
    >>> masked_train_step(oracle, x, x, np.array([[1, 1, 0]])).y.round(3).tolist()
    [[[-1.0, 1.0, 0.0]]]
    >>> oracle.running_mean.tolist()
    [2.0]
    """
    return _step(oracle, x, dy, mask, training=True)


def masked_infer_step(
    oracle: OracleBatchNorm, x: np.ndarray, dy: np.ndarray, mask: np.ndarray
) -> Step:
    """Take an inference call and its backward; see :func:`masked_train_step`.

    Parameters
    ----------
    oracle : OracleBatchNorm
    x, dy, mask : numpy.ndarray

    Returns
    -------
    Step
    """
    return _step(oracle, x, dy, mask, training=False)


def _step(
    oracle: OracleBatchNorm, x: np.ndarray, dy: np.ndarray, mask: np.ndarray, training: bool
) -> Step:
    valid = np.asarray(mask) != 0
    of_valid = replace(oracle, axis=1)  # the valid positions are the rows of a matrix
    rows = [np.moveaxis(np.asarray(a, np.float64), oracle.axis, -1)[valid] for a in (x, dy)]
    step = (of_valid.train_step if training else of_valid.infer_step)(*rows)
    for name in ("running_mean", "running_var", "batches"):
        setattr(oracle, name, getattr(of_valid, name))

    def spread(matrix: np.ndarray) -> np.ndarray:
        whole = np.zeros((*valid.shape, matrix.shape[1]))
        whole[valid] = matrix
        return np.moveaxis(whole, -1, oracle.axis)

    return replace(step, y=spread(step.y), dx=spread(step.dx))
