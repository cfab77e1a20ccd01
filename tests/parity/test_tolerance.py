"""How far two gradients may be apart: as the gradients of the same layer are rough."""

from scratchbn.parity.difference import differences
from scratchbn.parity.phases import Computed
from scratchbn.parity.row import PARAMETER_GRADIENT
from scratchbn.parity.settings import Settings

import numpy as np
import pytest


def settings():
    free = dict.fromkeys(("loss", "rtol", "atol", "statistics_rtol", "statistics_atol"))
    return Settings(1, True, "float64", ("eager",), 0.1, 0, **free, builtin=True, backend="auto")


def computed(bias, weight=10.0, other=1e3):
    tensors = {"0.bias": bias, "0.weight": weight, "1.weight": other}
    steps = {(PARAMETER_GRADIENT, name): np.array([value]) for name, value in tensors.items()}
    return Computed([steps])


# rtol and atol are 1e-10 and the layer's largest gradient is 10: 1.1e-9 in all.
@pytest.mark.parametrize(("bias", "holds"), [(1.05e-9, True), (1.2e-9, False), (np.nan, False)])
def test_a_bias_whose_gradient_cancels(bias, holds):
    rows = differences(computed(bias), computed(0.0), "eager", "train", settings())
    found = {row.tensor: row for row in rows}
    assert found["0.bias"].ok is holds
    assert found["0.weight"].ok and found["1.weight"].ok


def test_another_layer_lends_no_roughness():
    one, two = computed(0.0, weight=2e-9), computed(0.0, weight=0.0)
    rows = differences(one, two, "eager", "train", settings())
    assert [row.tensor for row in rows if not row.ok] == ["0.weight"]
