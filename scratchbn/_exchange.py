"""What a norm layer exchanges when it becomes one of the other kind: its options and its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxnet.gluon import HybridBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm

from ._net import can_have_gradient, options_of, own_parameters, values_of
from .layer import ScratchBatchNorm, ScratchBatchNormReLU

_REMEMBERED = "_class_before_conversion"


def exchange_for_scratch(layer: Any, is_float16: bool) -> Exchange:
    """Plan to make a layer of ours of a built-in one."""
    options = options_of(layer)
    if options["momentum"] is None:  # which means something else here
        raise ValueError("momentum must be between 0 and 1, got None")
    sync = isinstance(layer, SyncBatchNorm)
    new = _scratch_class(layer)(
        **(_sharing_of(layer) if sync else {"axis": options["axis"]}),
        momentum=options["momentum"],
        epsilon=options["eps"],
        # The built-in has no such option: a Parameter that can have no gradient is its record.
        center=can_have_gradient(layer.beta),
        scale=not options["fix_gamma"],
        use_global_stats=bool(options["use_global_stats"]),
        prefix="fresh_",
        **_initializers(layer),
    )
    # Parameters do not tell float16 from float32; the parameters of the other layers do.
    new.cast("float16" if is_float16 else layer.running_mean.dtype)
    if sync:
        old = SyncBatchNorm(num_devices=1, prefix="fresh_")
    else:
        old = (nn.BatchNormReLU if layer.fuse_relu else nn.BatchNorm)(prefix="fresh_")
    return Exchange(layer, old, new, "beta is not 0; with center=False it is ignored")


def _scratch_class(layer: Any) -> Callable[..., Any]:
    if isinstance(layer, SyncBatchNorm):
        from .sync import ScratchSyncBatchNorm  # it changes how MXNet words errors

        return ScratchSyncBatchNorm
    return ScratchBatchNormReLU if layer.fuse_relu else ScratchBatchNorm


def _sharing_of(layer: Any) -> dict[str, Any]:
    """Return which devices share; the key is the layer's own unless somebody has changed it."""
    options = options_of(layer)
    own = options["key"] == layer.prefix
    return {"num_devices": options["ndev"], "key": None if own else options["key"]}


def sync_class(layer: Any) -> list[type]:
    """Return the class of our layers that share, if a layer is one."""
    return [cls for cls in type(layer).__mro__ if cls.__name__ == "ScratchSyncBatchNorm"]


def _initializers(layer: Any) -> dict[str, Any]:
    """Return the initializers as options; None means the initializer that fits the name."""
    found = {
        "beta_initializer": layer.beta.init,
        "gamma_initializer": layer.gamma.init,
        "running_mean_initializer": layer.running_mean.init,
        "running_variance_initializer": layer.running_var.init,
    }
    return {name: init for name, init in found.items() if init is not None}


def exchange_for_builtin(layer: Any, is_float16: bool) -> Exchange:
    """Plan to make a built-in layer of one of ours."""
    options = options_of(layer)
    if options["momentum"] is None or hasattr(layer, "num_batches"):
        raise ValueError("momentum=None has no counterpart in nn.BatchNorm")
    if options["unbiased_variance"]:
        raise ValueError("unbiased_variance=True has no counterpart in nn.BatchNorm")
    if options["center"] != can_have_gradient(layer.beta):
        raise ValueError(
            f"center was changed to {options['center']} after the layer was built; "
            "nn.BatchNorm cannot do that"
        )
    has_relu, sync = isinstance(layer, ScratchBatchNormReLU), sync_class(layer)
    if sync and options["axis"] != 1:
        raise ValueError(f"axis={options['axis']} has no counterpart in SyncBatchNorm")
    built_in = nn.BatchNormReLU if has_relu else SyncBatchNorm if sync else nn.BatchNorm
    new = built_in(
        **({"num_devices": _number_of_devices(layer)} if sync else {"axis": options["axis"]}),
        momentum=options["momentum"],
        epsilon=options["eps"],
        center=options["center"],
        scale=not options["fix_gamma"],
        use_global_stats=options["use_global_stats"],
        prefix="fresh_",
    )
    if sync:
        options_of(new)["key"] = options["key"] or layer.prefix
        old = sync[0](num_devices=1, prefix="fresh_")
    else:
        old = (ScratchBatchNormReLU if has_relu else ScratchBatchNorm)(prefix="fresh_")
    return Exchange(layer, old, new, "center=False, but beta is not 0, and the built-in adds it")


def _number_of_devices(layer: Any) -> int:
    """Return how many devices share in a layer of ours; 1 if that is not known yet."""
    return layer.options.num_devices or max(len(values_of(layer.gamma)), 1)


class Exchange:
    """A layer's attributes to exchange, given a fresh layer of the class it has and will have.

    `old` is of the class that a conversion back would choose by itself; a layer of another one
    remembers its own.
    """

    def __init__(self, layer: Any, old: Any, new: Any, note: str) -> None:
        self._layer = layer
        self._loses = {*_given_by_class(old), _REMEMBERED}
        self._gains = _given_by_class(new)
        if type(layer) is not type(old):
            self._gains[_REMEMBERED] = type(layer)
        self.new_class: type = vars(layer).get(_REMEMBERED, type(new))
        self.note = note if _has_ignored_offset(layer) else ""

    def carry_out(self) -> None:
        attributes = vars(self._layer)
        for name in self._loses:
            attributes.pop(name, None)
        attributes.update(self._gains)
        self._layer.__class__ = self.new_class


def _given_by_class(fresh: Any) -> dict[str, Any]:
    """Return the attributes that a layer has over any block without Parameters."""
    others = {*vars(HybridBlock(prefix="fresh_")), *own_parameters(fresh)}
    return {name: value for name, value in vars(fresh).items() if name not in others}


def _has_ignored_offset(layer: Any) -> bool:
    """Tell whether beta is not trained and not 0, which the families treat differently."""
    values = values_of(layer.beta)
    return not can_have_gradient(layer.beta) and any(v.asnumpy().any() for v in values)
