"""The whole of batch normalization, from stock operators: eager, in graphs, in exported files."""

from __future__ import annotations

from typing import Any

from .. import functional
from .._graph.arrays import Array
from .._graph.mode import Mode, mode_now
from .._graph.state import depend, read, write
from .._graph.view import ChannelView
from .marker import attributes
from .way import Layer, State, in_float32, named


@named
@in_float32
def portable(layer: Layer, F: Any, x: Array, state: State) -> Array:
    """Normalize a batch: Algorithm 1 of the paper in training, Algorithm 2 in inference."""
    options = layer.options
    mode = mode_now(F, x, not options.use_global_stats, layer.training_flag(F, x))
    view = ChannelView(F, x, options.axis)
    running_mean, running_var = (view.shaped(read(v)) for v in state[2:4])
    gamma, beta = view.shaped(state.gamma), view.shaped(state.beta)
    gamma = gamma if options.scale else F.ones_like(gamma)
    beta = beta if options.center else F.zeros_like(beta)

    batch = layer.statistics(F, view, running_mean, running_var, mode.select)  # lines 1 and 2
    done = move_averages(layer, F, view, batch, state, mode)  # section 3.1
    for write_done in done:  # a graph computes only what its output depends on
        beta = depend(F, beta, write_done)
    y = layer.transform(F, view, batch, gamma, beta, options.epsilon)  # lines 3 and 4
    return layer.activate(F, view.reshape_back(y, attributes(layer) if mode.graph else None))


def move_averages(
    layer: Layer, F: Any, view: ChannelView, batch: Any, state: State, mode: Mode
) -> list[Array]:
    """Let the running statistics follow a batch that is finite and not empty; return the writes."""
    if not mode.may_train:
        # A write that changes nothing keeps them auxiliary states of an exported graph.
        return [write(F, v, read(v), F.zeros_like(v)) for v in state.moving if mode.graph]
    mean, variance = F.BlockGrad(batch.mean), F.BlockGrad(batch.variance)
    m: Array = getattr(batch, "m", view.m)
    if layer.options.unbiased_variance:
        variance = functional.unbiased_variance(F, variance, m)
    moves = mode.only_in_training(functional.all_finite(F, mean, variance, 1 / m))
    count = None if state.num_batches is None else read(state.num_batches)
    done = []
    for variable, statistic in ((state.running_mean, mean), (state.running_var, variance)):
        new = layer.update(F, read(variable), statistic, count)
        done.append(write(F, variable, new, F.broadcast_like(moves, new)))
    if count is not None:
        done.append(write(F, state.num_batches, count + 1, moves))
    return done
