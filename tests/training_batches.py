"""Batches whose channels differ, and a comparison of every bit."""

SHAPE = (6, 3, 4, 5)


def batch(rng, shape=SHAPE):
    channels = rng.uniform(-3, 3, size=(1, shape[1]) + (1,) * (len(shape) - 2))
    return rng.normal(size=shape) * 1.7 + channels


def assert_bits_equal(actual, expected):
    for a, e in zip(actual, expected):
        assert a.tobytes() == e.tobytes(), f"{a} != {e}"
