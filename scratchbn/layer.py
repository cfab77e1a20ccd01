"""The layers: parameters, validation, mode and dtype. The formulas are in ``functional``."""

from __future__ import annotations

from typing import Any, Union

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock

from . import _backend, _graph, functional
from ._checks import check_epsilon, check_flag, check_integer, check_momentum

__all__ = ["ScratchBatchNorm", "ScratchBatchNormReLU"]

Array = Any
Initializer = Union[str, mx.init.Initializer]

_STATISTICS_DTYPE: dict[Any, np.dtype[Any]] = {
    np.dtype("float16"): np.dtype("float32"),
    np.dtype("float32"): np.dtype("float32"),
    np.dtype("float64"): np.dtype("float64"),
}


def _as_dtype(dtype: Any) -> Any:
    try:
        return np.dtype(dtype)
    except TypeError:
        return None


def _check_initializer(name: str, value: Any) -> Initializer:
    if not isinstance(value, (str, mx.init.Initializer)):
        raise TypeError(f"{name} must be a str or an Initializer, got {value!r}")
    try:
        mx.init.create(value)
    except Exception as error:
        raise ValueError(f"{name} must name a registered initializer, got {value!r}") from error
    return value


class ScratchBatchNorm(HybridBlock):
    r"""Batch normalization from registered operators, none of them a normalization operator.

    In training it normalizes with the mean and the biased variance of the batch and moves the
    running statistics, once per call, in the forward:

    .. math:: y = \gamma \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta, \qquad
              r \leftarrow \text{momentum} \cdot r + (1 - \text{momentum}) \cdot b

    In inference it normalizes with the running statistics and changes nothing. The mode is
    ``autograd.is_training()``; in a hybridized or exported graph it is read when the graph runs.

    Parameters
    ----------
    axis : int, default 1
        The channel axis; negative counts from the end.
    momentum : float or None, default 0.9
        How much of the running statistics a training batch keeps, between 0 and 1. None: the
        plain average over all training batches, counted in one more Parameter, ``num_batches``.
    epsilon : float, default 1e-5
        Added to the variance, in units of the input squared; not negative. With 0, a constant
        channel gives `beta` and passes no gradient.
    center : bool, default True
        Add `beta`. If False, beta is treated as 0.
    scale : bool, default True
        Multiply by `gamma`. If False, gamma is treated as 1.
    use_global_stats : bool, default False
        Normalize with the running statistics in training too, and do not move them.
    beta_initializer, gamma_initializer : str or Initializer, default 'zeros', 'ones'
        For the trainable Parameters.
    running_mean_initializer, running_variance_initializer : str or Initializer
        For the running statistics; default 'zeros', 'ones'.
    in_channels : int, default 0
        C, the length of `axis`. With 0 it is taken from the first input.
    unbiased_variance : bool, default False
        Keep the running average of the unbiased variance, m / (m - 1) times the biased one, as
        cuDNN and PyTorch do; m is the number of elements per channel. A batch with m = 1 has
        none, and leaves the running statistics as they are.
    prefix : str, optional
        See ``mxnet.gluon.Block``.
    params : ParameterDict, optional
        Share the Parameters of another layer; see ``mxnet.gluon.Block``.

    Attributes
    ----------
    gamma, beta : Parameter, shape (C,)
        Trainable; with ``grad_req='null'`` and unused where `scale` or `center` is False.
    running_mean, running_var : Parameter, shape (C,)
        ``grad_req='null'``. float32 for input of float16 and float32, float64 for float64.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above.

    Notes
    -----
    Inputs and outputs: **data**, of any rank >= 2 and of dtype float16, float32 or float64, and
    the result, of the same shape and dtype. Statistics of float16 are computed in float32.

    A training batch that is empty, or in which any channel's mean or variance is not finite,
    leaves all running statistics as they are. A batch of one value per channel has variance 0.
    A running statistic that is not finite stays so until it is set.

    A graph is for float16 if the layer was cast to it or the input of the whole net was, and it
    keeps that: cast the net and export it again.

    A graph asks for its mode with a ``Dropout`` operator, which draws one random number per call:
    under the same seed, other random operators of the net see another stream.

    To build a variant, override :meth:`statistics`, :meth:`update` or :meth:`transform`; they
    serve eager code and graphs alike (docs/your-own-variant.md).

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167,
    Algorithms 1 and 2, and section 3.1 for the moving averages.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = ScratchBatchNorm(in_channels=2)
    >>> layer.initialize()
    >>> x = mx.nd.array([[1, 7], [5, 4], [6, 10]])
    >>> with mx.autograd.record():
    ...     y = layer(x)
    >>> print(y.asnumpy().round(4))
    [[-1.3887  0.    ]
     [ 0.4629 -1.2247]
     [ 0.9258  1.2247]]
    >>> print(layer.running_mean.data().asnumpy())
    [0.4 0.7]
    """

    # A variant that overrides `statistics` or `transform` says so if it still infers as this layer
    # does: gamma * (x - running_mean) / sqrt(running_var + epsilon) + beta. Then exports fold it.
    infers_as_batch_norm = False

    def __init__(
        self,
        axis: int = 1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        running_mean_initializer: Initializer = "zeros",
        running_variance_initializer: Initializer = "ones",
        in_channels: int = 0,
        *,
        unbiased_variance: bool = False,
        prefix: str | None = None,
        params: mx.gluon.ParameterDict | None = None,
    ) -> None:
        options = {
            "axis": check_integer("axis", axis),
            "eps": check_epsilon(epsilon),
            "momentum": check_momentum(momentum),
            "fix_gamma": not check_flag("scale", scale),
            "use_global_stats": check_flag("use_global_stats", use_global_stats),
            "center": check_flag("center", center),
            "unbiased_variance": check_flag("unbiased_variance", unbiased_variance),
        }
        initializers = {
            "beta_initializer": beta_initializer,
            "gamma_initializer": gamma_initializer,
            "running_mean_initializer": running_mean_initializer,
            "running_variance_initializer": running_variance_initializer,
        }
        for name, value in initializers.items():
            _check_initializer(name, value)
        shape = (check_integer("in_channels", in_channels, least=0),)

        super().__init__(prefix=prefix, params=params)
        # Helpers written for nn.BatchNorm, GluonCV's among them, edit this dict to change options.
        self._kwargs = options
        self._initializers = initializers
        self._dtype = _as_dtype("float32")
        self._traced_for = None
        if in_channels:
            self.in_channels = in_channels

        self.gamma = self._parameter("gamma", shape, gamma_initializer, trainable=scale)
        self.beta = self._parameter("beta", shape, beta_initializer, trainable=center)
        self.running_mean = self._parameter("running_mean", shape, running_mean_initializer)
        self.running_var = self._parameter("running_var", shape, running_variance_initializer)
        if momentum is None:
            self.num_batches = self._parameter("num_batches", (1,), "zeros")

    def _parameter(
        self, name: str, shape: tuple[int, ...], init: Initializer, trainable: bool = False
    ) -> mx.gluon.Parameter:
        return self.params.get(
            name,
            shape=shape,
            init=init,
            grad_req="write" if trainable else "null",
            differentiable=trainable,
            allow_deferred_init=True,
        )

    def _alias(self) -> str:
        return "batchnorm"  # the built-in's prefix, so that parameter files interchange

    def __repr__(self) -> str:
        options = self._kwargs
        shown = {
            "axis": options["axis"],
            "momentum": options["momentum"],
            "epsilon": options["eps"],
            "center": options["center"],
            "scale": not options["fix_gamma"],
            "use_global_stats": options["use_global_stats"],
            **{
                name: value if isinstance(value, str) else value.dumps()
                for name, value in self._initializers.items()
            },
            "in_channels": max(self.gamma.shape[0], 0) if self.gamma.shape else 0,
            "unbiased_variance": options["unbiased_variance"],
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def cast(self, dtype: Any) -> None:
        """Cast the layer for input of another dtype.

        Parameters
        ----------
        dtype : str or numpy.dtype
            float16, float32 or float64. The Parameters are float32 for float16.

        Raises
        ------
        TypeError
            If `dtype` is none of these.
        """
        wanted = _as_dtype(dtype)
        if wanted not in _STATISTICS_DTYPE:
            raise TypeError(f"dtype must be float16, float32 or float64, got {dtype!r}")
        self._dtype = wanted
        super().cast(_STATISTICS_DTYPE[wanted].name)

    def _check_input(self, x: mx.nd.NDArray) -> None:
        if x.ndim < 2:
            raise ValueError(
                f"data must have at least 2 axes, a batch axis and a channel axis; got {x.shape}"
            )
        axis = self._kwargs["axis"]
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis={axis} is out of range for data of shape {x.shape}")
        channels = self.gamma.shape[0] if self.gamma.shape else 0
        if channels > 0 and x.shape[axis] != channels:
            raise ValueError(
                f"data must have {channels} channels on axis {axis} (in_channels={channels}), "
                f"got {x.shape[axis]} in shape {x.shape}"
            )
        if x.shape[axis] == 0:
            raise ValueError(f"data must have at least 1 channel on axis {axis}, got {x.shape}")
        dtype = np.dtype(x.dtype)
        if dtype not in _STATISTICS_DTYPE:
            raise TypeError(f"data must be float16, float32 or float64, got {dtype.name}")
        needed, held = _STATISTICS_DTYPE[dtype], np.dtype(self.running_mean.dtype)
        if held != needed:
            raise TypeError(
                f"data of dtype {dtype.name} needs parameters of {needed.name}, got {held.name}: "
                f"call cast('{dtype.name}') on the layer or the net first"
            )

    def infer_shape(self, x: Array) -> None:
        """Take the number of channels from an input, and the shape of each Parameter from it."""
        if _graph.is_symbol(x):
            super().infer_shape(x)
            return
        self._check_input(x)
        channels = x.shape[self._kwargs["axis"]]
        for parameter in (self.gamma, self.beta, self.running_mean, self.running_var):
            parameter.shape = (channels,)

    def forward(self, x: Array) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x : NDArray, np.ndarray or Symbol
            float16, float32 or float64; rank >= 2; C channels on the layer's axis.

        Returns
        -------
        NDArray, np.ndarray or Symbol
            Of `x`'s shape and dtype.

        Raises
        ------
        ValueError
            If the rank, the axis or the number of channels is wrong.
        TypeError
            If the dtype is none of the three, or not the one the layer was cast to. Inside a
            hybridized net MXNet itself reports wrong shapes and types, as an MXNetError.
        """
        if isinstance(x, mx.nd.NDArray):
            self._check_input(x)
            if x.dtype != self._traced_for:  # a graph is for float16 or not
                self._clear_cached_op()
                self._traced_for = x.dtype
        return super().forward(x)

    def hybrid_forward(
        self,
        F: Any,
        x: Array,
        gamma: Array,
        beta: Array,
        running_mean: Array,
        running_var: Array,
        num_batches: Array = None,
    ) -> Array:
        """Normalize a batch; see :meth:`forward`. `F` is ``mxnet.nd`` or ``mxnet.sym``."""
        given = x
        x, gamma, beta = map(_graph.to_classic, (x, gamma, beta))
        stored = [_graph.to_classic(v) for v in (running_mean, running_var)]
        counter = None if num_batches is None else _graph.to_classic(num_batches)
        options = self._kwargs
        axis = check_integer("axis", options["axis"])
        epsilon = check_epsilon(options["eps"])

        description = self._describe()
        if _graph.is_symbol(x) and _graph.marking() and description is not None:
            y = self._activate(F, _graph.marker(F, x, description))
            return y if given is x else _graph.to_numpy(y)

        low = _graph.is_float16(x, self._dtype)
        values = F.cast(x, dtype="float32") if low else x
        if self._is_stock() and _backend.is_native(_graph.devices(x), _graph.is_symbol(x)):
            counters = [] if counter is None else [counter]
            y = self._compiled(F, values, gamma, beta, [*stored, *counters])
            y = F.cast(y, dtype="float16") if low else y
            return y if given is x else _graph.to_numpy(y)

        view = _graph.ChannelView(F, values, axis)
        mode = _graph.mode(F, x, may_train=not options["use_global_stats"])
        running_mean, running_var = (view.per_channel(_graph.current(v)) for v in stored)
        batch = self.statistics(F, view, running_mean, running_var, mode.select)
        written = self._move(F, view, batch, stored, counter, mode)

        gamma = F.ones_like(gamma) if options["fix_gamma"] else gamma
        beta = beta if options["center"] else F.zeros_like(beta)
        gamma, beta = view.per_channel(gamma), view.per_channel(beta)
        for done in written:
            beta = _graph.after(F, beta, done)
        y = self.transform(F, view, batch, gamma, beta, epsilon)
        y = self._activate(F, view.restore(y, description))
        y = F.cast(y, dtype="float16") if low else y
        return y if given is x else _graph.to_numpy(y)

    def statistics(
        self,
        F: Any,
        view: _graph.ChannelView,
        running_mean: Array,
        running_var: Array,
        select: _graph.Select,
    ) -> functional.Statistics:
        """Choose what to normalize with; a variant may override it.

        Parameters
        ----------
        F : module
            ``mxnet.nd`` or ``mxnet.sym``.
        view : ChannelView
            The batch, in float32 or float64.
        running_mean, running_var : NDArray or Symbol, shape (C,)
        select : Select
            ``select(batch, running)`` returns ``batch()`` in training and `running` otherwise,
            in a graph when it runs.

        Returns
        -------
        Statistics
            In training the running statistics move towards its mean and variance.
        """
        return functional.statistics(F, view, running_mean, running_var, select)

    def update(self, F: Any, running: Array, batch: Array, count: Array) -> Array:
        """Return the new value of a running statistic; a variant may override it.

        Parameters
        ----------
        F : module
            ``mxnet.nd`` or ``mxnet.sym``.
        running, batch : NDArray or Symbol, shape (C,)
            The mean, or the variance: kept so far, and of this training batch.
        count : NDArray or Symbol, shape (1,), or None
            How many batches `running` is made of; None unless the layer was built with
            ``momentum=None``.

        Returns
        -------
        NDArray or Symbol, shape (C,)

        Raises
        ------
        ValueError
            If ``momentum`` was set to None on a layer that does not count batches.
        """
        momentum = check_momentum(self._kwargs["momentum"])
        if momentum is not None:
            return functional.running_average(running, batch, momentum)
        if count is None:
            raise ValueError("momentum=None needs a layer that was built with momentum=None")
        return functional.cumulative_average(F, running, batch, count)

    def transform(
        self,
        F: Any,
        view: _graph.ChannelView,
        batch: functional.Statistics,
        gamma: Array,
        beta: Array,
        epsilon: float,
    ) -> Array:
        """Normalize, scale and shift; a variant may override it.

        Parameters
        ----------
        F : module
            ``mxnet.nd`` or ``mxnet.sym``.
        view : ChannelView
            How to find the elements of each channel.
        batch : Statistics
            What :meth:`statistics` returned.
        gamma, beta : NDArray or Symbol, shape (C,)
        epsilon : float

        Returns
        -------
        NDArray or Symbol, shape (L, C * S)
        """
        return functional.scale_and_shift(F, view, batch, gamma, beta, epsilon)

    def _activate(self, F: Any, y: Array) -> Array:
        return y

    def _is_stock(self) -> bool:
        """Tell whether this layer computes what the compiled kernel does, no variant of it."""
        hooks = ("statistics", "update", "transform", "_move")
        counts = "num_batches" in self._reg_params
        return counts == (self._kwargs["momentum"] is None) and all(
            getattr(type(self), hook) is getattr(ScratchBatchNorm, hook) for hook in hooks
        )

    def _compiled(self, F: Any, x: Array, gamma: Array, beta: Array, stored: list[Array]) -> Array:
        options = self._kwargs
        relu = type(self)._activate is ScratchBatchNormReLU._activate
        y = _graph.compiled_batch_norm(
            F,
            x,
            gamma,
            beta,
            stored,
            may_train=not options["use_global_stats"],
            axis=check_integer("axis", options["axis"]),
            epsilon=check_epsilon(options["eps"]),
            momentum=check_momentum(options["momentum"]),
            scale=not options["fix_gamma"],
            center=options["center"],
            relu=relu,
            unbiased_variance=options["unbiased_variance"],
        )
        return y if relu else self._activate(F, y)

    def _describe(self) -> dict[str, Any] | None:
        """Return the options and the names of the Parameters; None if inference is another."""
        changed = {
            name
            for name in ("statistics", "transform", "update")
            if getattr(type(self), name) is not getattr(ScratchBatchNorm, name)
        }
        if changed - {"update"} and not self.infers_as_batch_norm:
            return None
        options = self._kwargs
        in_training: tuple[str, ...] = ("momentum", "use_global_stats", "unbiased_variance")
        if changed:
            in_training = ()
        return {
            **{name: options[name] for name in in_training},
            "axis": options["axis"],
            "epsilon": options["eps"],
            "fix_gamma": options["fix_gamma"],
            "center": options["center"],
            "gamma": self.gamma.name,
            "beta": self.beta.name,
            "running_mean": self.running_mean.name,
            "running_var": self.running_var.name,
        }

    def _move(
        self,
        F: Any,
        view: _graph.ChannelView,
        batch: functional.Statistics,
        stored: list[Array],
        counter: Array,
        mode: _graph.Mode,
    ) -> list[Array]:
        """Move the running statistics if this is a training batch; return what was written."""
        if not mode.may_train:
            # A write that changes nothing keeps them auxiliary states of an exported graph.
            kept = [v for v in (*stored, counter) if v is not None and mode.graph]
            return [_graph.assign(F, v, _graph.current(v), F.zeros_like(v)) for v in kept]
        mean, variance = F.BlockGrad(batch.mean), F.BlockGrad(batch.variance)
        if self._kwargs["unbiased_variance"]:
            variance = functional.unbiased_variance(F, variance, view.m)
        moves = mode.training(functional.all_finite(F, mean, variance))
        count: Array = None if counter is None else _graph.current(counter)
        written = []
        for variable, statistic in zip(stored, (mean, variance)):
            new = self.update(F, _graph.current(variable), statistic, count)
            written.append(_graph.assign(F, variable, new, F.broadcast_like(moves, new)))
        if counter is not None:
            written.append(_graph.assign(F, counter, count + 1, moves))
        return written


class ScratchBatchNormReLU(ScratchBatchNorm):
    """Batch normalization followed by ``max(y, 0)``.

    Takes the arguments of :class:`ScratchBatchNorm`.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = ScratchBatchNormReLU(in_channels=2)
    >>> layer.initialize()
    >>> with mx.autograd.record():
    ...     y = layer(mx.nd.array([[1, 7], [5, 4], [6, 10]]))
    >>> print(y.asnumpy().round(4))
    [[0.     0.    ]
     [0.4629 0.    ]
     [0.9258 1.2247]]
    """

    def _alias(self) -> str:
        return "batchnormrelu"

    def _activate(self, F: Any, y: Array) -> Array:
        return F.relu(y)
