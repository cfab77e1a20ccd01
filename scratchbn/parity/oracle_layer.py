"""The oracle as a Gluon layer, so that nets can be built from it and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock

from .oracle import OracleBatchNorm

__all__ = ["OracleLayer", "OracleReLU"]

_STATE = ("gamma", "beta", "running_mean", "running_var")


class OracleLayer(HybridBlock):
    """The oracle with the parameters and options of ScratchBatchNorm; always eager.

    It takes and returns arrays of any dtype, computes in float64 and rounds once.

    Parameters
    ----------
    axis, momentum, epsilon, center, scale, use_global_stats, beta_initializer, in_channels
        As of ScratchBatchNorm.
    unbiased_variance, prefix, params
        As of ScratchBatchNorm.
    """

    relu = False

    def __init__(
        self,
        axis: int = 1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: str = "zeros",
        in_channels: int = 0,
        unbiased_variance: bool = False,
        prefix: str | None = None,
        params: Any = None,
    ) -> None:
        super().__init__(prefix=prefix, params=params)
        self._kwargs: dict[str, Any] = {
            "axis": axis,
            "momentum": momentum,
            "epsilon": epsilon,
            "center": center,
            "scale": scale,
            "use_global_stats": use_global_stats,
            "unbiased_variance": unbiased_variance,
        }
        self._add("gamma", in_channels, "ones", trained=scale)
        self._add("beta", in_channels, beta_initializer, trained=center)
        self._add("running_mean", in_channels, "zeros", trained=False)
        self._add("running_var", in_channels, "ones", trained=False)
        if momentum is None:
            self._add("num_batches", 1, "zeros", trained=False)

    def _add(self, name: str, length: int, init: str, trained: bool) -> None:
        parameter = self.params.get(
            name,
            shape=(length,),
            init=init,
            grad_req="write" if trained else "null",
            differentiable=trained,
            allow_deferred_init=True,
        )
        setattr(self, name, parameter)

    def cast(self, dtype: Any) -> None:
        """Cast the parameters; they are float32 for float16.

        Parameters
        ----------
        dtype : str or numpy.dtype
            Of the data.
        """
        super().cast("float32" if np.dtype(dtype) == np.float16 else dtype)

    def forward(self, x: Any) -> Any:
        """Normalize a batch.

        Parameters
        ----------
        x : NDArray

        Returns
        -------
        NDArray
        """
        state = {name: getattr(self, name).data(x.ctx).asnumpy() for name in _STATE}
        cumulative = self._kwargs["momentum"] is None
        batches = int(self.num_batches.data(x.ctx).asscalar()) if cumulative else 0
        oracle = OracleBatchNorm(**state, **self._kwargs, relu=self.relu, batches=batches)
        training = autograd.is_training()
        # Function mixes gradients up where an input has none, so such inputs stay out.
        trained = [n for n in ("gamma", "beta") if getattr(self, n).grad_req != "null"]
        arrays = [getattr(self, name).data(x.ctx) for name in trained]
        y = _OracleFunction(oracle, training, trained)(x, *arrays)
        if training:
            oracle.train(x.asnumpy())
            for name in ("running_mean", "running_var"):
                getattr(self, name).set_data(mx.nd.array(getattr(oracle, name), dtype="float64"))
            if cumulative:
                self.num_batches.set_data(mx.nd.array([oracle.batches]))
        return y


class OracleReLU(OracleLayer):
    """The oracle followed by ``max(y, 0)``."""

    relu = True


class _OracleFunction(autograd.Function):
    """One call of the oracle, whose gradients are the oracle's own."""

    def __init__(self, oracle: OracleBatchNorm, training: bool, trained: Sequence[str]) -> None:
        super().__init__()
        copy = replace(oracle)  # whose statistics move without the caller's moving
        self._step = copy.train_step if training else copy.infer_step
        self._trained = trained

    def forward(self, x: Any, *trained: Any) -> Any:
        self._x, self._dtypes = x.asnumpy(), [array.dtype for array in (x, *trained)]
        y = self._step(self._x, np.zeros(x.shape)).y
        return mx.nd.array(y, dtype=x.dtype, ctx=x.ctx)

    def backward(self, dy: Any) -> Any:
        step = self._step(self._x, dy.asnumpy())
        gradients = [step.dx, *(getattr(step, f"d{name}") for name in self._trained)]
        return tuple(
            mx.nd.array(gradient, dtype=dtype, ctx=dy.ctx)
            for gradient, dtype in zip(gradients, self._dtypes)
        )
