"""The arithmetic of folding: the fused weights compute what layer and norm compute."""

from scratchbn.deploy._lower.weights import fused_weights, scale_and_shift

import mxnet as mx
import numpy as np
import pytest

KERNEL = {"kernel": (3, 2), "num_filter": 6}
LAYERS = {
    "convolution": ("Convolution", KERNEL, (6, 4, 3, 2)),
    "grouped": ("Convolution", {**KERNEL, "num_group": 2}, (6, 2, 3, 2)),
    "transposed": ("Deconvolution", KERNEL, (4, 6, 3, 2)),
    "transposed grouped": ("Deconvolution", {**KERNEL, "num_group": 2}, (4, 3, 3, 2)),
    "dense": ("FullyConnected", {"num_hidden": 6}, (6, 4 * 5 * 5)),
}


def compute(operator, options, x, weight, bias):
    arrays = [mx.nd.array(v, dtype="float64") for v in (x, weight, bias) if v is not None]
    return getattr(mx.nd, operator)(*arrays, no_bias=bias is None, **options).asnumpy()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_fused_weights_compute_layer_and_norm(case, has_bias, rng):
    operator, options, shape = LAYERS[case]
    x, weight = rng.normal(size=(2, 4, 5, 5)), rng.normal(size=shape)
    bias, scale, shift = rng.normal(size=(3, 6))
    bias = bias if has_bias else None
    y = compute(operator, options, x, weight, bias)
    per_channel = (1, 6) + (1,) * (y.ndim - 2)
    expected = y * scale.reshape(per_channel) + shift.reshape(per_channel)
    before = weight.copy()
    fused = fused_weights(
        weight, bias, scale, shift, options.get("num_group", 1), operator == "Deconvolution"
    )
    np.testing.assert_allclose(compute(operator, options, x, *fused), expected, atol=1e-12)
    np.testing.assert_array_equal(weight, before)


def test_scale_and_shift_are_the_norm(rng):
    y, (gamma, beta, mean, variance) = rng.normal(size=(7, 3)), rng.uniform(0.5, 2, (4, 3))
    for g in (gamma, None):
        scale, shift = scale_and_shift(g, beta, mean, variance, 0.1)
        factor = 1 if g is None else g
        expected = factor * (y - mean) / np.sqrt(variance + 0.1) + beta
        np.testing.assert_allclose(scale * y + shift, expected, rtol=1e-12)


def test_a_channel_that_never_varies_is_shifted_to_beta():
    two = np.full(2, 2.0)
    scale, shift = scale_and_shift(two, two, two, np.array([0.0, 4.0]), 0)
    assert scale.tolist() == [0, 1]
    assert shift.tolist() == [2, 0]
