"""Options that do not do what they say."""

from __future__ import annotations

from functools import partial
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..parity.oracle import OracleBatchNorm
from .case import Bench, Outcome, defect
from .measuring import batch, complaint, numbers, statistics


@defect("`scale=False` overwrites gamma with 1, eagerly in inference too", 9624)
def scale_false(bench: Bench) -> Outcome:
    """The operator writes ones into gamma instead of leaving it out."""
    layer, gammas = bench.layer(3, scale=False, values={"gamma": 5}), []
    net = bench.net(layer)
    for mode in (autograd.predict_mode, autograd.record):
        with mode():
            net(bench.array(batch()))
        mx.nd.waitall()
        gammas.append(layer.gamma.data().asnumpy()[0])
    text = "gamma of 5 is {:g} after inference, {:g} after training".format(*gammas)
    return Outcome(gammas == [5, 5], gammas == [5 if bench.mode == "graph" else 1, 1], text)


@defect("`center=False` still adds beta", 11774, 10401)
def center_false(bench: Bench) -> Outcome:
    """The operator has no such option; the layer only stops training beta."""
    layer = bench.layer(3, center=False, values={"beta": 5})
    x = batch()
    y = bench.net(layer)(bench.array(x)).asnumpy()
    shift = float((y - OracleBatchNorm.fresh(3).infer(x)).mean())
    return Outcome(abs(shift) < 1e-5, abs(shift - 5) < 1e-3, f"beta of 5 adds {abs(shift):.2g}")


@defect("momentum=5 and epsilon=-1 are accepted")
def invalid_options(bench: Bench) -> Outcome:
    """Nothing looks at them."""
    options: list[dict[str, Any]] = [{"momentum": 5.0}, {"epsilon": -1.0}]
    errors = [complaint(partial(bench.layer, 3, **o)) for o in options]
    text = "; ".join(error or "accepted" for error in errors)
    sound = all(error and error.startswith("ValueError") for error in errors)
    return Outcome(sound, not any(errors), text)


@defect("5 channels declared, 3 given: accepted, part of the statistics move")
def too_few_channels(bench: Bench) -> Outcome:
    """The kernel reads as many parameters as the data has channels, without comparing the two."""
    layer = bench.layer(5)
    error = complaint(lambda: bench.step(bench.net(layer), batch()))
    mean = statistics(layer)[0]
    text = f"{error or 'accepted'}; running mean {numbers(mean)}"
    moved = list(mean != 0)
    return Outcome(bool(error) and not any(moved), not error and moved == [1, 1, 1, 0, 0], text)


@defect("3 channels declared, 100000 given: memory beyond the parameters", 20128, apart=True)
def too_many_channels(bench: Bench) -> Outcome:
    """The kernel reads as many parameters as the data has channels, without comparing the two."""
    layer = bench.layer(3)
    error = complaint(lambda: bench.step(bench.net(layer), np.ones((2, 100000, 4, 4))))
    mean = statistics(layer)[0]
    text = f"{error or 'accepted'}; running mean {numbers(mean)}"
    return Outcome(bool(error) and not mean.any(), not error, text)
