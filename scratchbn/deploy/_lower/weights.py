"""The arithmetic of folding, on NumPy arrays alone.

A batch normalization in inference is ``scale * y + shift`` for each channel of its input ``y``. If
``y = W x + b`` is the output of a convolution or a dense layer, then::

    scale * (W x + b) + shift  =  (scale W) x + (scale b + shift)

and if it is the input of one, without padding::

    W (scale * x + shift) + b  =  (W scale) x + (W shift + b)
"""

from __future__ import annotations

import numpy as np


def scale_and_shift(
    gamma: np.ndarray | None,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch normalization in inference as one scale and one shift per channel.

    ``scale = gamma / sqrt(variance + epsilon)`` and ``shift = beta - scale * mean``; without gamma
    it is 1. A channel that never varies, with epsilon 0, has scale 0, as in the layer.

    >>> scale_and_shift(np.array([6.0]), np.array([1.0]), np.array([2.0]), np.array([9.0]), 0)
    (array([2.]), array([-3.]))
    """
    total = variance + epsilon
    scale = np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total != 0)
    if gamma is not None:
        scale = gamma * scale
    return scale, beta - mean * scale


def fused_weights(
    weight: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray,
    shift: np.ndarray,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of a layer that computes ``scale * layer(x) + shift``.

    ``weight' = scale * weight``, where each scale belongs to an output channel, and
    ``bias' = scale * bias + shift``.

    Parameters
    ----------
    weight : array, shape (C_out, C_in / groups, ...); (C_in, C_out / groups, ...) if transposed
    bias : array, shape (C_out,), or None
    scale, shift : array, shape (C_out,)
    groups : int
        Of a grouped convolution.
    transposed : bool
        Whether the layer is a transposed convolution.

    Examples
    --------
    >>> weight, bias = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 1.0])
    >>> scale, shift = np.array([2.0, 10.0]), np.array([0.5, 0.0])
    >>> fused_weights(weight, bias, scale, shift)
    (array([[ 2.,  4.],
           [30., 40.]]), array([ 2.5, 10. ]))
    >>> fused_weights(weight, None, scale, shift, transposed=True)
    (array([[ 2., 20.],
           [ 6., 40.]]), array([0.5, 0. ]))
    """
    if transposed:
        # The group of an input channel tells which output channels it is for.
        inputs, outputs = weight.shape[:2]
        factor = np.repeat(scale.reshape(groups, outputs), inputs // groups, axis=0)
    else:
        factor = scale
    factor = factor.reshape(factor.shape + (1,) * (weight.ndim - factor.ndim))
    return weight * factor, shift if bias is None else scale * bias + shift


def weights_before_norm(
    weight: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray,
    shift: np.ndarray,
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of a layer that computes ``layer(scale * x + shift)``.

    Parameters
    ----------
    weight : array, shape (C_out, C_in / groups, ...) or (C_out, C_in * ...)
        Of a convolution without padding, or of a dense layer.
    bias : array, shape (C_out,), or None
    scale, shift : array, shape (C_in,)
    groups : int
        Of a grouped convolution.

    Examples
    --------
    >>> weight, scale, shift = np.array([[1.0, 2.0]]), np.array([2.0, 10.0]), np.array([0.5, 1.0])
    >>> weights_before_norm(weight, None, scale, shift)
    (array([[ 2., 20.]]), array([2.5]))
    """
    outputs = len(weight)
    factor, term = (
        np.repeat(v.reshape(groups, -1), outputs // groups, axis=0) for v in (scale, shift)
    )
    by_channel = weight.reshape(outputs, len(scale) // groups, -1)
    total = (by_channel * term[:, :, None]).sum(axis=(1, 2))
    fused = (by_channel * factor[:, :, None]).reshape(weight.shape)
    return fused, total if bias is None else bias + total
