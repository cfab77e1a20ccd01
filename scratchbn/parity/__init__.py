"""Compare two normalization layers, or two whole nets, tensor by tensor.

:func:`compare` gives two nets the same parameters, data and output gradients and says where they
differ. :func:`run_grid` does that for a layer class and a reference over :func:`standard_grid`, on
one backend or on all of :func:`backends_at_hand`.
The reference may be ``oracle_layer.OracleLayer``: ``oracle`` computes in NumPy, in float64, and
shares no code with the layers.
"""

from .compare import compare
from .grid import Case, run_grid, standard_grid
from .report import Report
from .row import Row
from .where import backends_at_hand

__all__ = ["Case", "Report", "Row", "backends_at_hand", "compare", "run_grid", "standard_grid"]
