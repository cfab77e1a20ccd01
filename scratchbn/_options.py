"""The options of a layer: a dict, as helpers written for ``nn.BatchNorm`` expect, that checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from ._checks import check_epsilon, check_flag, check_integer, check_momentum


class Options(dict[str, Any]):
    """Options by the names of the built-in's operator, checked whenever one is set.

    GluonCV's helpers among others read and edit ``layer._kwargs``, whose keys are `eps` and
    `fix_gamma`; what a constructor calls `epsilon` and `scale` is translated here and nowhere else.
    Every key can be read and set as an attribute too, and so can `epsilon` and `scale`.

    Raises
    ------
    TypeError, ValueError
        If a value is not of the kind or range of its option; the option then is as before.
    """

    checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "axis": partial(check_integer, "axis"),
        "eps": check_epsilon,
        "momentum": check_momentum,
        "fix_gamma": partial(check_flag, "fix_gamma"),
        "use_global_stats": partial(check_flag, "use_global_stats"),
        "center": partial(check_flag, "center"),
        "unbiased_variance": partial(check_flag, "unbiased_variance"),
    }

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()
        self.update(*args, **values)

    def __setitem__(self, key: str, value: Any) -> None:
        check = self.checks.get(key)
        super().__setitem__(key, value if check is None else check(value))

    def update(self, *args: Any, **values: Any) -> None:
        """Set several options, or none if one of them is wrong."""
        checked = {k: self.checks.get(k, lambda v: v)(v) for k, v in dict(*args, **values).items()}
        super().update(checked)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Set an option that is not there yet."""
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, values: Any) -> Options:  # type: ignore[override, misc]
        self.update(values)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no option {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            name, value = "fix_gamma", not check_flag("scale", value)
        key = "eps" if name == "epsilon" else name
        if key not in self:
            raise AttributeError(f"there is no option {name!r}")
        self[key] = value

    @property
    def epsilon(self) -> float:
        """What is added to the variance, in units of the input squared."""
        return float(self["eps"])

    @property
    def scale(self) -> bool:
        """Whether gamma is used."""
        return not self["fix_gamma"]

    def arguments(self) -> dict[str, Any]:
        """Return the options by the names of the layer's arguments, a variant's own first."""
        names = {"eps": "epsilon", "fix_gamma": "scale"}
        own = [key for key in self if key not in Options.checks]
        ordered = dict.fromkeys([*own, *self])
        return {names.get(key, key): getattr(self, names.get(key, key)) for key in ordered}
