"""The layer against the oracle over any sequence of calls that hypothesis can think of."""

import dataclasses
import tempfile
from pathlib import Path

import scratchbn
from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import hypothesis
import hypothesis.strategies as st
import mxnet as mx
import numpy as np
from helpers import Subject, in_mode, infer, random_values, set_values, take_step, train_forward
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mxnet.gluon import SymbolBlock, nn
from oracle_tolerances import LAYERS, Reference, check, rounded

KINDS = ("eager", "hybrid", "static_alloc", "static_shape")
seeds = st.integers(0, 2**16)
OTHER = {"float32": "float64", "float64": "float32"}


class History(RuleBasedStateMachine):
    """A net of one norm layer, used in any order of ways; `subject.oracle` is what it should be."""

    def __init__(self, device, directory):
        super().__init__()
        self.device = device
        self.directory = Path(tempfile.mkdtemp(dir=directory))

    def new_net(self):
        net = nn.HybridSequential()
        net.add(self.layer_class(**self.options))
        return net

    @property
    def layer(self):
        return self.subject.net[0]

    @property
    def oracle(self):
        return self.subject.oracle

    @initialize(
        shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
        data=st.data(),
        dtype=st.sampled_from(("float64", "float32")),
        kind=st.sampled_from(KINDS),
        layer_class=st.sampled_from(LAYERS),
        momentum=st.sampled_from((0.9, 0.5, None, 0.0, 1.0)),
        flags=st.tuples(*[st.booleans()] * 3),
        seed=seeds,
    )
    def start(self, shape, data, dtype, kind, layer_class, momentum, flags, seed):
        axis = data.draw(st.integers(-len(shape), len(shape) - 1), "axis")
        self.shape, self.axis, self.channels = shape, axis, shape[axis]
        self.layer_class = layer_class
        self.options = {
            "axis": axis,
            "momentum": momentum,
            "epsilon": 1e-3,
            **dict(zip(("center", "scale", "unbiased_variance"), flags)),
        }
        values = random_values(np.random.default_rng(seed), self.channels)
        values = {name: rounded(value, dtype) for name, value in values.items()}
        oracle = Reference(**values, relu=layer_class is ScratchBatchNormReLU, **self.options)
        net = self.new_net()
        net.initialize(ctx=self.device)
        net[0].infer_shape(mx.nd.zeros(shape, ctx=self.device))
        net.cast(dtype)
        for parameter in net.collect_params().values():
            parameter._finish_deferred_init()
        set_values(net[0], values)
        self.subject = Subject(kind, net[0], in_mode(net, kind), oracle, self.device, dtype)
        self.before_freeze = None

    def batch(self, seed, offset=0.0):
        """Data and head gradient; every length but the channel's changes with the seed."""
        rng = np.random.default_rng(seed)
        shape = [n + rng.integers(0, 3) for n in self.shape]
        shape[self.axis] = self.channels
        return rng.normal(size=shape) * rng.uniform(0.1, 10) + offset, rng.normal(size=shape)

    @rule(seed=seeds, offset=st.sampled_from((0.0, 1.0, -30.0)), backwards=st.integers(1, 2))
    def train(self, seed, offset, backwards):
        def take(x, dy):
            return take_step(self.subject, x, dy, backwards=backwards)

        check(self.subject, *self.batch(seed, offset), True, take)

    @rule(seed=seeds)
    def train_without_recording(self, seed):
        self.forward_only(self.subject, seed, True, train_forward)

    @rule(seed=seeds)
    def infer(self, seed):
        self.forward_only(self.subject, seed, False, infer)

    def forward_only(self, subject, seed, training, run):
        def take(x, dy):
            return Output(run(subject, x).astype(np.float64))

        check(subject, *self.batch(seed), training, take)

    @rule(seed=seeds)
    def record_inference(self, seed):
        def take(x, dy):
            return take_step(self.subject, x, dy, record_train=False)

        check(self.subject, *self.batch(seed), False, take)

    @rule(seed=seeds)
    def write_parameters(self, seed):
        values = random_values(np.random.default_rng(seed), self.channels)
        for name in ("gamma", "beta"):
            value = rounded(values[name], self.subject.dtype)
            set_values(self.layer, {name: value})
            setattr(self.oracle, name, value)

    @rule()
    def freeze(self):
        scratchbn.freeze(self.subject.net)
        if self.before_freeze is None:
            self.before_freeze = self.oracle.use_global_stats
        self.oracle.use_global_stats = True

    @rule()
    def unfreeze(self):
        scratchbn.unfreeze(self.subject.net)
        if self.before_freeze is not None:
            self.oracle.use_global_stats = self.before_freeze
        self.before_freeze = None

    @rule(value=st.booleans())
    def edit_options(self, value):
        self.layer._kwargs["use_global_stats"] = value
        self.layer._clear_cached_op()
        self.subject.net._clear_cached_op()
        self.oracle.use_global_stats = value

    @rule()
    def cast(self):
        self.subject.dtype = OTHER[self.subject.dtype]
        self.subject.net.cast(self.subject.dtype)
        for name in ("gamma", "beta", "running_mean", "running_var"):
            setattr(self.oracle, name, rounded(getattr(self.oracle, name), self.subject.dtype))

    @rule(kind=st.sampled_from(KINDS))
    def hybridize(self, kind):
        self.subject.net.hybridize(False)
        self.subject.net = in_mode(self.subject.net, kind)
        self.subject.mode = kind

    @rule()
    def save_and_go_on_in_another_net(self):
        path = str(self.directory / "net.params")
        self.subject.net.save_parameters(path)
        net = self.new_net()
        net.cast(self.subject.dtype)
        net.load_parameters(path, ctx=self.device)
        net[0]._kwargs["use_global_stats"] = self.oracle.use_global_stats
        self.subject.layer = net[0]
        self.subject.net = in_mode(net, self.subject.mode)
        self.before_freeze = None

    @precondition(lambda self: self.subject.mode != "eager")
    @rule(seed=seeds)
    def export_and_train_the_copy(self, seed):
        self.infer(seed)
        prefix = str(self.directory / "exported")
        self.subject.net.export(prefix)
        net = SymbolBlock.imports(
            f"{prefix}-symbol.json", ["data"], f"{prefix}-0000.params", ctx=self.device
        )
        copy = dataclasses.replace(
            self.subject, mode="exported", net=net, oracle=Reference(**vars(self.oracle))
        )
        self.forward_only(copy, seed + 1, False, infer)
        check(copy, *self.batch(seed + 2), True, lambda *a: take_step(copy, *a))
        self.forward_only(copy, seed + 3, False, infer)

    @precondition(
        lambda self: self.options["momentum"] is not None and not self.options["unbiased_variance"]
    )
    @rule(seed=seeds)
    def be_built_in_for_a_while(self, seed):
        _, report = scratchbn.to_builtin(self.subject.net, report=True)
        assert len(report.converted) == 1
        assert not isinstance(self.layer, ScratchBatchNorm)
        # The built-in overwrites gamma without scale, adds beta without center, and its layer with
        # ReLU takes one kind of input only.
        if self.options["center"] and self.options["scale"] and not self.oracle.relu:
            self.forward_only(self.subject, seed, False, infer)
        _, report = scratchbn.to_scratch(self.subject.net, report=True)
        assert report.skipped == ()  # but a note, where beta is not 0 without center
        self.subject.layer = self.layer
        assert type(self.layer) is self.layer_class

    @invariant()
    def state_is_the_oracles_to_the_bit(self):
        for name in ("gamma", "beta", "running_mean", "running_var"):
            value = self.subject.value(name)
            assert value.dtype == self.subject.dtype
            np.testing.assert_array_equal(value, getattr(self.oracle, name), err_msg=name)
        if self.options["momentum"] is None:
            assert self.subject.value("num_batches") == [self.oracle.batches]
        assert self.layer._kwargs["use_global_stats"] == self.oracle.use_global_stats


@dataclasses.dataclass(frozen=True)
class Output:
    """A step without a backward."""

    y: np.ndarray
    dx: None = None
    dgamma: None = None
    dbeta: None = None


def test_any_sequence_of_calls(device, tmp_path):
    run_state_machine_as_test(
        lambda: History(device, tmp_path),
        settings=hypothesis.settings(max_examples=100, stateful_step_count=20, deadline=None),
    )
