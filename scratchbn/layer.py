"""The layers: parameters, validation, mode and dtype. The formulas are in ``functional``."""

from __future__ import annotations

from typing import Any, NoReturn

import mxnet as mx
from mxnet.gluon import HybridBlock

from . import backends, functional
from ._arguments import refuse_unknown
from ._checks import check_flag, check_integer
from ._data import (
    Initializer,
    check_array,
    check_data,
    check_dtype,
    check_initializer,
    check_traced,
    statistics_dtype,
)
from ._graph.arrays import Array, is_numpy, is_symbol, to_classic, to_numpy
from ._graph.mode import Select
from ._graph.view import ChannelView
from ._options import Options

__all__ = ["ScratchBatchNorm", "ScratchBatchNormReLU"]


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
        ``grad_req='null'``. float32 for input of float16, bfloat16 and float32; float64 for
        float64.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above.

    Notes
    -----
    Inputs and outputs: **data**, of any rank >= 2 and of dtype float16, bfloat16, float32 or
    float64, and the result, of the same shape and dtype. What has 16 bits is computed in float32.

    A training batch that is empty, or in which any channel's mean or variance is not finite,
    leaves all running statistics as they are. A batch of one value per channel has variance 0.
    A running statistic that is not finite stays so until it is set.

    A graph is for float16 if the layer was cast to it, the input of the whole net was, or AMP casts
    what is before the layer; it keeps that: cast the net and export it again.

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

    options_class: type[Options] = Options  # a variant with options of its own has its own
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
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown(type(self), unknown)
        options = self.options_class(
            axis=axis,
            momentum=momentum,
            eps=epsilon,
            center=center,
            fix_gamma=not check_flag("scale", scale),
            use_global_stats=use_global_stats,
            unbiased_variance=unbiased_variance,
        )
        initializers = {
            "beta_initializer": beta_initializer,
            "gamma_initializer": gamma_initializer,
            "running_mean_initializer": running_mean_initializer,
            "running_variance_initializer": running_variance_initializer,
        }
        for name, value in initializers.items():
            check_initializer(name, value)
        shape = (check_integer("in_channels", in_channels, least=0),)

        super().__init__(prefix=prefix, params=params)
        # Helpers written for nn.BatchNorm, GluonCV's among them, edit this dict to change options.
        self._kwargs = options
        self._initializers = initializers
        self.data_dtype = check_dtype("float32")
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

    @property
    def options(self) -> Options:
        """The options, by the constructor's names; set them to change what the next call does."""
        return self._kwargs

    def __repr__(self) -> str:
        options = self.options.arguments()
        initializers = {
            name: value if isinstance(value, str) else value.dumps()
            for name, value in self._initializers.items()
        }
        shown = {**options, **initializers, "in_channels": self._known_channels()}
        shown["unbiased_variance"] = shown.pop("unbiased_variance")
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def _known_channels(self) -> int:
        return max(self.gamma.shape[0], 0) if self.gamma.shape else 0

    def cast(self, dtype: Any) -> None:
        """Cast the layer for input of another dtype.

        Parameters
        ----------
        dtype : str or numpy.dtype
            float16, bfloat16, float32 or float64. The Parameters are float32 for 16 bits.

        Raises
        ------
        TypeError
            If `dtype` is none of these.
        """
        self.data_dtype = check_dtype(dtype)
        super().cast(statistics_dtype(dtype).name)

    def _check_input(self, x: mx.nd.NDArray) -> None:
        check_data(x, self.options.axis, self._known_channels(), self.running_mean.dtype)

    def infer_shape(self, x: Array) -> None:
        """Take the number of channels from an input, and the shape of each Parameter from it."""
        if is_symbol(x):
            super().infer_shape(x)
            return
        self._check_input(x)
        channels = x.shape[self.options.axis]
        for parameter in (self.gamma, self.beta, self.running_mean, self.running_var):
            parameter.shape = (channels,)

    def forward(self, x: Array) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x : NDArray, np.ndarray or Symbol
            float16, bfloat16, float32 or float64; rank >= 2; C channels on the layer's axis.

        Returns
        -------
        NDArray, np.ndarray or Symbol
            Of `x`'s shape and dtype.

        Raises
        ------
        ValueError
            If the rank, the axis or the number of channels is wrong.
        TypeError
            If the dtype is none of the four, or not the one the layer was cast to. Inside a
            hybridized net MXNet itself reports wrong shapes and types, as an MXNetError.
        """
        check_array(x)
        if not is_symbol(x):
            self._check_input(x)
            if x.dtype != self._traced_for:  # a graph is for 16 bits or not
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
        check_traced(x, self.options.axis)
        state = backends.State.of(gamma, beta, running_mean, running_var, num_batches)
        compute = backends.choose(self, x)  # portable, native or marker
        y = compute(self, F, to_classic(x), state)
        return to_numpy(y) if is_numpy(x) else y

    def statistics(
        self,
        F: Any,
        view: ChannelView,
        running_mean: Array,
        running_var: Array,
        select: Select,
    ) -> functional.Statistics:
        """Choose what to normalize with; a variant may override it.

        `view` is the batch in float32 or float64, the statistics have shape (C,), and
        ``select(batch, running)`` returns ``batch()`` in training and `running` otherwise, in a
        graph when it runs. In training the running statistics follow the `mean` and `variance`
        of what is returned; `transform` gets all of it.
        """
        return functional.statistics(F, view, running_mean, running_var, select)

    def training_flag(self, F: Any, x: Array) -> Array:
        """Return what tells a graph whether it trains, (1,); None leaves it to ``Dropout``."""
        return None

    def update(self, F: Any, running: Array, batch: Array, count: Array) -> Array:
        """Return the new value of a running statistic; a variant may override it.

        `running` and `batch`, shape (C,), are the mean, or the variance: kept so far, and of this
        training batch. `count`, shape (1,), says how many batches `running` is made of; None
        unless the layer was built with ``momentum=None``.
        """
        if self.options.momentum is not None:
            return functional.running_average(running, batch, self.options.momentum)
        if count is None:
            raise ValueError("momentum=None needs a layer that was built with momentum=None")
        return functional.cumulative_average(F, running, batch, count)

    def transform(
        self,
        F: Any,
        view: ChannelView,
        batch: functional.Statistics,
        gamma: Array,
        beta: Array,
        epsilon: float,
    ) -> Array:
        """Normalize, scale and shift; a variant may override it.

        `batch` is what :meth:`statistics` returned; `gamma` and `beta` have shape (C,). Returns an
        array that is shaped as ``view.values`` is.
        """
        return functional.scale_and_shift(F, view, batch, gamma, beta, epsilon)

    def activate(self, F: Any, y: Array) -> Array:
        """Return what follows the normalization, of `y`'s shape; here `y` itself."""
        return y

    @property
    def overridden(self) -> set[str]:
        """The names of those hooks above that a subclass has overridden, `activate` apart."""
        hooks = ("statistics", "update", "transform")
        base = ScratchBatchNorm
        return {name for name in hooks if getattr(type(self), name) is not getattr(base, name)}

    @property
    def is_stock(self) -> bool:
        """Whether this layer computes what the compiled kernel does, no variant of it."""
        counts = "num_batches" in self._reg_params
        return counts == (self.options.momentum is None) and not self.overridden

    @property
    def activates_by_relu(self) -> bool:
        """Whether `activate` is that of :class:`ScratchBatchNormReLU`."""
        return type(self).activate is ScratchBatchNormReLU.activate


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

    def activate(self, F: Any, y: Array) -> Array:
        """Return ``max(y, 0)``."""
        return F.relu(y)
