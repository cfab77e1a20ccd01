"""Layers with a fault planted in each, and what is compared of them."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity import Case

import numpy as np

SHAPE = (6, 4, 5, 5)


class Blind(ScratchBatchNorm):
    """Ignores gamma."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        gamma = F.ones_like(gamma)
        return super().transform(F, view, batch, gamma, beta, epsilon)


class Detached(ScratchBatchNorm):
    """Lets no gradient through the batch mean."""

    def statistics(self, F, view, running_mean, running_var, select):
        batch = super().statistics(F, view, running_mean, running_var, select)
        return batch._replace(low=F.BlockGrad(batch.low))


class Stuck(ScratchBatchNorm):
    """Never moves its running statistics."""

    def update(self, F, running, batch, count):
        return running


class Nan(ScratchBatchNorm):
    """Its output is NaN in inference."""

    def statistics(self, F, view, running_mean, running_var, select):
        return super().statistics(F, view, running_mean, running_var * np.nan, select)


def kinds(report, **where):
    """The kinds of tensors that failed, in rows whose attributes are as given."""
    return {
        row.kind for row in report.failures if all(getattr(row, k) == v for k, v in where.items())
    }


def few(full):
    return [Case((4, 3)), Case((4, 3), {"axis": 0}, "float32")]
