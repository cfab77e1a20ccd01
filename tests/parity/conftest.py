"""The batch that nets are compared on."""

import pytest
from compared_layers import SHAPE


@pytest.fixture
def x(rng):
    """A batch with a mean that is not 0 and a variance that is not 1."""
    return rng.normal(1, 2, SHAPE)
