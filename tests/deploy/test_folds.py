"""Folds past what lies between a norm and a layer, into what follows, and of calls that share."""

import os

from scratchbn.deploy import fold, largest_difference
from scratchbn.deploy._lower.weights import weights_before_norm

import mxnet as mx
import numpy as np
import pytest

S = mx.sym
IMAGE = (2, 4, 6, 6)
EXACT = 1e-13


def conv(x, i=0, **options):
    options = {"kernel": (3, 3), "num_filter": 4, "name": f"conv{i}", **options}
    return S.Convolution(x, **options)


def bn(x, i=0, **options):
    return S.BatchNorm(x, **{"fix_gamma": False, "name": f"bn{i}", **options})


def fc(x, i=0, **options):
    return S.FullyConnected(x, **{"num_hidden": 5, "name": f"fc{i}", **options})


def values(symbol, rng, shape):
    arguments, _, auxiliary = symbol.infer_shape(data=shape)
    names = [*symbol.list_arguments(), *symbol.list_auxiliary_states()]
    shapes = dict(zip(names, [*arguments, *auxiliary]))
    return {
        name: mx.nd.array(
            rng.uniform(0.5, 2, s) if name.endswith("var") else rng.normal(size=s), dtype="float64"
        )
        for name, s in shapes.items()
        if name != "data"
    }


def folded(symbol, rng, shape=IMAGE, **options):
    """Fold in float64, with the shape known and not, compare, and return the first model."""
    params = values(symbol, rng, shape)
    for shapes in (None, {"data": shape}):
        model = fold(symbol, params, shapes=shapes, **options)
        difference, size = largest_difference((symbol, params), model[:2], {"data": shape})
        assert difference < EXACT * size
        assert "BatchNorm" not in model[0].tojson() or model[2].kept
    return model


x = S.var("data")
FOLDED = {
    "flatten of a 1x1 map": lambda: bn(S.Flatten(conv(x, kernel=(6, 6)))),
    "flatten of a dense layer": lambda: bn(S.Flatten(fc(x)), axis=1),
    "reshape to a map": lambda: bn(S.Reshape(fc(x), shape=(0, 0, 1, 1))),
    "reshape to a map, channels given": lambda: bn(S.Reshape(fc(x), shape=(-1, 5, 1, 1))),
    "reshape of the map alone": lambda: bn(S.Reshape(conv(x), shape=(0, 0, -1))),
    "reshape of a 1x1 map": lambda: bn(S.Reshape(conv(x, kernel=(6, 6)), shape=(0, -1))),
    "concat": lambda: bn(S.Concat(conv(x, 0), conv(x, 1, num_filter=3), dim=1)),
    "concat of concats": lambda: bn(S.Concat(conv(x, 0), S.Concat(conv(x, 1), conv(x, 2)))),
    "concat of dense layers": lambda: bn(S.Concat(fc(x, 0), fc(x, 1, num_hidden=2), dim=1)),
    "concat behind a negative axis": lambda: bn(S.Concat(conv(x, 0), conv(x, 1)), axis=1),
    "scalars": lambda: bn((conv(x) - 1) * 2 + 0.25),
    "scalars from the left": lambda: bn(3 - conv(x) / 4),
    "scalars in a concat": lambda: bn(S.Concat(conv(x, 0) * 2, 1 - conv(x, 1))),
    "flatten of scalars": lambda: bn(S.Flatten(conv(x, kernel=(6, 6)) * 2)),
    "deconvolution": lambda: bn(
        S.Concat(S.Deconvolution(x, kernel=(3, 3), num_filter=3), S.Deconvolution(
            x, kernel=(3, 3), num_filter=4, num_group=2))
    ),
    "before a convolution": lambda: conv(bn(S.relu(x))),
    "before a convolution without bias": lambda: conv(bn(x), no_bias=True),
    "before a grouped convolution": lambda: conv(bn(x), num_group=2),
    "before a depthwise convolution": lambda: conv(bn(x), num_group=4, num_filter=8),
    "before a dense layer": lambda: fc(bn(x)),
    "before a dense layer without bias": lambda: fc(bn(x), no_bias=True),
    "before flatten and a dense layer": lambda: fc(S.Flatten(bn(x))),
    "before dropout and a dense layer": lambda: fc(S.Dropout(bn(S.relu(x)))),
    "before several layers": lambda: S.Group([conv(bn(x)), fc(S.Flatten(bn(x, 1)))]),
    "before two layers": lambda: (lambda y: S.Group([conv(y), fc(y)]))(bn(x)),
    "before a layer with a norm": lambda: bn(conv(bn(x)), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case, rng):
    _, _, report = folded(FOLDED[case](), rng)
    assert report.folded and not report.kept


def test_scalars_disappear(rng):
    symbol, _, report = folded(bn((conv(x) - 1) * 2), rng)
    assert "scalar" not in symbol.tojson()
    assert [row.result for row in report.folded] == ["folded into conv0"]


def test_a_norm_merges_past_scalars(rng):
    _, _, report = folded(bn(bn(S.relu(x)) * 2 + 1, 1), rng, style="batchnorm")
    assert [row.result for row in report.folded] == ["merged into bn0"]


def test_a_concat_of_a_norm_and_a_convolution(rng):
    _, _, report = folded(bn(S.Concat(bn(S.relu(x)), conv(x, pad=(1, 1))), 1), rng)
    assert [row.result for row in report.folded] == ["folded into conv0, bn0"]


@pytest.mark.parametrize("axis, shape", [(-1, (2, 3, 4)), (2, (2, 3, 4))])
def test_before_a_dense_layer_on_the_last_axis(axis, shape, rng):
    symbol = fc(bn(S.relu(x), axis=axis), flatten=False)
    params = values(symbol, rng, shape)
    folded, fewer, report = fold(symbol, params, shapes={"data": shape})
    assert report.kept == ()
    difference, size = largest_difference((symbol, params), (folded, fewer), {"data": shape})
    assert difference < EXACT * size


def test_without_a_shift_padding_is_no_obstacle(rng):
    symbol = conv(bn(S.relu(x)), pad=(1, 1))
    params = values(symbol, rng, IMAGE)
    params["bn0_beta"][:] = params["bn0_moving_mean"][:] = 0
    folded, fewer, report = fold(symbol, params)
    assert report.kept == ()
    difference, size = largest_difference((symbol, params), (folded, fewer), {"data": IMAGE})
    assert difference < EXACT * size


def shared(count, norms=1, no_bias=False, between=lambda y: y, **options):
    """Call a convolution several times, and the same norms after each call."""
    names = ("weight", "bias", "gamma", "beta", "moving_mean", "moving_var")
    weight, bias, gamma, beta, mean, var = (S.var(f"tower_{name}") for name in names)
    heads = []
    for i in range(count):
        kernels = {"weight": weight, "no_bias": no_bias} | ({} if no_bias else {"bias": bias})
        y = conv(x * (i + 1), i, **kernels, stride=(i + 1, i + 1))
        for j in range(norms):
            parameters = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_var": var}
            y = bn(between(y), f"{i}_{j}", **parameters, **options)
        heads.append(S.relu(y))
    return S.Group(heads)


@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("count", [2, 3])
def test_a_layer_and_its_norm_called_several_times(count, norms, no_bias, rng):
    _, fewer, report = folded(shared(count, norms, no_bias), rng)
    assert len(report.folded) == count * norms
    assert set(fewer) == {"tower_weight", "tower_bias"}


def unlike():
    weight = S.var("w")
    return S.Group([bn(conv(x * (i + 1), i, weight=weight, no_bias=True), i) for i in range(2)])


def used_without_norm():
    weight = S.var("w")
    plain, normed = (conv(x * (i + 1), i, weight=weight, no_bias=True) for i in range(2))
    return S.Group([plain, bn(normed)])


REFUSED = {
    "one layer, several norms": (unlike, "several layers"),
    "one call has no norm": (used_without_norm, "several layers"),
    "relu between calls": (lambda: shared(2, between=S.relu), "(relu)"),
    "flatten of a map": (lambda: bn(S.Flatten(conv(x))), "channels are mixed"),
    "reshape that mixes": (lambda: bn(S.Reshape(conv(x), shape=(-1, 4, 1, 1))), "(Reshape)"),
    "reshape of a map": (lambda: bn(S.Reshape(conv(x), shape=(0, -1))), "channels are mixed"),
    "reshape in reverse": (
        lambda: bn(S.Reshape(conv(x), shape=(0, 0, -1), reverse=True), axis=1),
        "(Reshape)",
    ),
    "concat along another axis": (lambda: bn(S.Concat(conv(x, 0), conv(x, 1), dim=2)), "(Concat)"),
    "concat of an input": (lambda: bn(S.Concat(conv(x, pad=(1, 1)), x)), "(Concat)"),
    "concat of one layer twice": (
        lambda: (lambda y: bn(S.Concat(y, y)))(conv(x)),
        "used 2 times",
    ),
    "a concat that is used again": (
        lambda: (lambda y: S.Group([bn(y), S.relu(y)]))(S.Concat(conv(x, 0), conv(x, 1))),
        "used 2 times",
    ),
    "scalars that are used again": (
        lambda: (lambda y: S.Group([bn(y), S.relu(y)]))(conv(x) * 2),
        "used 2 times",
    ),
    "a power": (lambda: bn(conv(x) ** 2), "_power_scalar"),
    "before a padded convolution": (lambda: conv(bn(S.relu(x)), pad=(1, 1)), "(relu)"),
    "before a deconvolution": (
        lambda: S.Deconvolution(bn(S.relu(x)), kernel=(2, 2), num_filter=3),
        "(relu)",
    ),
    "before a layer and something else": (
        lambda: (lambda y: S.Group([fc(y), S.tanh(y)]))(bn(S.relu(x))),
        "(relu)",
    ),
    "another axis before a convolution": (lambda: conv(bn(S.relu(x), axis=2)), "(relu)"),
    "another axis before a dense layer": (lambda: fc(bn(S.relu(x), axis=3)), "(relu)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, rng):
    build, because = REFUSED[case]
    _, _, report = folded(build(), rng)
    assert any(because in row.because for row in report.kept), report


def test_a_head_before_a_layer_is_kept(rng):
    y = bn(S.relu(x))
    _, _, report = folded(S.Group([y, fc(y)]), rng)
    assert [row.node for row in report.kept] == ["bn0"]


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_before_norm_compute_layer_of_norm(groups, rng):
    x, weight = rng.normal(size=IMAGE), rng.normal(size=(6, 4 // groups, 3, 3))
    (scale, shift), bias = rng.normal(size=(2, 4)), rng.normal(size=6)

    def compute(x, weight, bias):
        arrays = [mx.nd.array(v, dtype="float64") for v in (x, weight, bias)]
        options = {"kernel": (3, 3), "num_filter": 6, "num_group": groups}
        return mx.nd.Convolution(*arrays, **options).asnumpy()

    expected = compute(x * scale.reshape(1, 4, 1, 1) + shift.reshape(1, 4, 1, 1), weight, bias)
    fused = weights_before_norm(weight, bias, scale, shift, groups)
    np.testing.assert_allclose(compute(x, *fused), expected, atol=1e-12)


def test_a_sum_of_a_convolution_and_itself_runs_where_mxnet_fuses(rng, monkeypatch):
    symbol = (lambda y: y + S.Dropout(y))(bn(conv(x)))
    model = folded(symbol, rng)
    assert "elemwise_add" not in model[0].tojson()
    monkeypatch.setenv("MXNET_SUBGRAPH_BACKEND", "MKLDNN")
    values = {name: value.astype("float32") for name, value in model[1].items()}
    executor = model[0].bind(mx.cpu(), {"data": mx.nd.ones(IMAGE), **values}, grad_req="null")
    assert np.isfinite(executor.forward()[0].asnumpy()).all()


def test_models_are_compared_as_they_are_written_and_in_silence(rng, monkeypatch, capfd):
    """OneDNN's fusion replaces the output of a convolution that is a head by that of its norm."""
    monkeypatch.setenv("MXNET_SUBGRAPH_BACKEND", "MKLDNN")
    y = conv(x)
    symbol = S.Group([y, bn(y)])
    params = {n: v.astype("float32") for n, v in values(symbol, rng, IMAGE).items()}
    model = fold(symbol, params)[:2]
    difference, size = largest_difference((symbol, params), model, {"data": IMAGE})
    assert difference < 1e-5 * size
    assert os.environ["MXNET_SUBGRAPH_BACKEND"] == "MKLDNN"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("style", ["dwconv", "affine"])
def test_a_rank_that_depends_on_a_length(style, rng):
    symbol = bn(S.squeeze(S.var("data")))
    params = values(symbol, rng, (2, 4, 1, 1))
    *model, report = fold(symbol, params, shapes={"data": (2, 4, 1, 1)}, style=style)
    assert "depends on lengths" in str(report)
    for shape in ((2, 4, 1, 1), (2, 4, 4, 1), (2, 4, 4, 4)):  # what is (1, 4) fits all of these
        difference, size = largest_difference((symbol, params), model, {"data": shape})
        assert difference < EXACT * size
