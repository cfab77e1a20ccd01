"""The variants as layers that take the options of batch normalization only; data for them."""

from scratchbn.variants import BatchRenorm, GhostBatchNorm

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VARIANTS = [(GhostBatchNorm, 4), (BatchRenorm, 1.5, 0.2)]


def of(variant, *arguments):
    """A class of layers that takes the options of ScratchBatchNorm only."""
    return type(
        variant.__name__,
        (variant,),
        {"__init__": lambda self, **options: variant.__init__(self, *arguments, **options)},
    )


def data(rng, shape):
    """A batch and a head gradient."""
    return rng.normal(1, 2, shape), rng.normal(size=shape)
