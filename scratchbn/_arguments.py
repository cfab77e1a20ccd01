"""What to say of a keyword that no layer takes: people bring those of other layers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

_OF_SYNC = "ScratchSyncBatchNorm, which shares the statistics of several devices, takes it"
_NO_USE = "the operator BatchNorm has it and these layers have no use for it: leave it out"
_ADVICE = {
    **dict.fromkeys(("num_devices", "key", "timeout"), _OF_SYNC),
    "ndev": f"as num_devices, {_OF_SYNC}",
    **dict.fromkeys(("cudnn_off", "output_mean_var", "min_calib_range"), _NO_USE),
    "max_calib_range": _NO_USE,
    "eps": "write epsilon",
    "fix_gamma": "write scale, which is True where fix_gamma is False",
    "affine": "write center and scale",
    "track_running_stats": "write use_global_stats, or momentum",
    **dict.fromkeys(("num_features", "channels", "units"), "write in_channels"),
    "weight_initializer": "write gamma_initializer",
    "bias_initializer": "write beta_initializer",
    "moving_mean_initializer": "write running_mean_initializer",
    "moving_variance_initializer": "write running_variance_initializer",
    "dtype": "call cast(dtype) on the layer or the net",
    "name": "write prefix",
    "groups": "nn.GroupNorm has it",
    "activation": "ScratchBatchNormReLU has a relu; any other is a layer behind this one",
    "mask": "it is an argument of the call, layer(x, mask), of scratchbn.masked.MaskedBatchNorm",
}


def refuse_unknown(layer: type, unknown: Mapping[str, Any]) -> None:
    """Raise TypeError, with advice, if there are keywords that a class of layers does not take."""
    if not unknown:
        return
    taken = _arguments_of(layer)
    name, value = next(iter(unknown.items()))
    near = difflib.get_close_matches(name, taken, n=1)
    advice = _ADVICE.get(name) or (f"write {near[0]}" if near else "")
    if name == "ndev" and "num_devices" in taken:
        advice = "write num_devices"
    listed = f"the arguments of {layer.__name__} are {', '.join(taken)}"
    said = f"{advice}; {listed}" if advice else listed
    raise TypeError(f"{layer.__name__} has no argument {name}={value!r}: {said}")


def _arguments_of(layer: type) -> list[str]:
    """Return the names of what the constructors of a class and its bases take, its own first."""
    names: dict[str, None] = {}
    for base in layer.__mro__:
        if not base.__module__.startswith("mxnet") and "__init__" in vars(base):
            signature = inspect.signature(vars(base)["__init__"])
            for parameter in [*signature.parameters.values()][1:]:
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    names[parameter.name] = None
    return list(names)
