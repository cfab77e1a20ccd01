"""What converting exported models keeps, notes or refuses, and what the command says of it."""

import json

from scratchbn import ScratchBatchNorm, cli, convert_files, deploy, use_backend
from scratchbn.backends.marker import KEY as MARKER
from scratchbn.deploy._files import write_model

import mxnet as mx
import pytest
from converted_files import LAYERS, OTHER, check_training_agrees, export, operators, sequential
from mxnet.gluon import HybridBlock

from models.lenet import initialize, lenet


def test_one_function_by_both_names():
    assert deploy.convert_files is convert_files


@pytest.mark.parametrize("option", [{"momentum": None}, {"unbiased_variance": True}], ids=str)
def test_options_without_counterpart_are_refused(option, rng, tmp_path):
    net = sequential(ScratchBatchNorm, lambda: ScratchBatchNorm(**option))
    model = export(net, tmp_path / "net", rng, (4, 2))
    with pytest.raises(ValueError, match=rf"net_batchnorm1 .*{next(iter(option))}="):
        convert_files(*model, to="builtin")


@pytest.mark.parametrize("zero", [True, False])
def test_center_is_noted(zero, rng, tmp_path):
    net = sequential(lambda: ScratchBatchNorm(center=False))
    symbol, params = export(net, tmp_path / "net", rng, (4, 2))
    if zero:
        params["arg:net_batchnorm0_beta"][:] = 0
    _, _, report = convert_files(symbol, params, to="builtin")
    assert ("is not 0" in report.notes[0].text) != zero
    assert "net_batchnorm0_beta" in report.notes[0].text
    if not zero:
        with pytest.raises(ValueError, match=r"at node 'net_batchnorm0_fwd' \(center=False, but"):
            convert_files(symbol, params, to="builtin", shapes={"data": (4, 2)})


@pytest.mark.parametrize("epsilon, off", [(1e-6, True), (1e-5, False)])
def test_an_epsilon_that_cudnn_does_not_take(epsilon, off, rng, tmp_path):
    net = sequential(lambda: ScratchBatchNorm(epsilon=epsilon))
    symbol, _, _ = convert_files(*export(net, tmp_path / "net", rng, (4, 2)), to="builtin")
    (attrs,) = [a for a in symbol.attr_dict().values() if "eps" in a]
    assert float(attrs["eps"]) == epsilon
    assert (attrs.get("cudnn_off") == "True") == off


class Doubled(ScratchBatchNorm):
    def transform(self, F, view, batch, gamma, beta, epsilon):
        return super().transform(F, view, batch, gamma, beta, epsilon) * 2


def test_a_variant_is_kept(rng, tmp_path):
    net = sequential(ScratchBatchNorm, Doubled)
    symbol, params, report = convert_files(
        *export(net, tmp_path / "net", rng, (4, 2)), to="builtin"
    )
    assert [len(report.converted), len(report.skipped)] == [1, 1]
    assert "no description" in str(report)
    assert operators(symbol).count("sgd_mom_update") == 2  # one for each running statistic
    write_model(tmp_path / "after", symbol, params)
    check_training_agrees(tmp_path / "net", tmp_path / "after", (4, 2), rng)


def test_a_description_without_training_options_is_kept(rng, tmp_path):
    net = sequential(ScratchBatchNorm)
    symbol, params = export(net, tmp_path / "net", rng, (4, 2))
    node = next(name for name, attrs in symbol.attr_dict().items() if MARKER in attrs)
    about = json.loads(symbol.attr_dict()[node][MARKER])
    del about["momentum"]
    symbol._set_attr(**{MARKER: json.dumps(about)})
    converted, _, report = convert_files(symbol, params, to="builtin")
    assert "does not tell its momentum" in report.skipped[0].text
    assert operators(converted) == operators(symbol)


def norms(rng, *names, channels=3):
    ends = ("gamma", "beta", "moving_mean", "moving_var")
    return {f"{n}_{e}": mx.nd.array(rng.uniform(1, 2, channels)) for n in names for e in ends}


def test_nodes_that_are_kept(rng):
    data = mx.sym.var("data")
    gamma = mx.sym.var("computed_gamma") * 2
    kept = [
        mx.sym.BatchNorm(data, gamma, name="computed"),
        mx.sym.BatchNorm(data, output_mean_var=True, name="outputs"),
    ]
    symbol = mx.sym.Group([*kept, mx.sym.BatchNorm(data, name="bn")])
    params = norms(rng, "computed", "outputs", "bn")
    converted, _, report = convert_files(symbol, params, to="scratch")
    assert [entry.path for entry in report.converted] == ["bn"]
    assert {entry.name: entry.text.partition(" ")[2] for entry in report.skipped} == {
        "computed": "is computed in the graph",
        "outputs": "statistics are outputs too",
    }
    assert operators(converted).count("BatchNorm") == 2


def test_statistics_shared_by_unlike_nodes(rng):
    data, mean, var = (mx.sym.var(n) for n in ("data", "a_moving_mean", "a_moving_var"))
    first = mx.sym.BatchNorm(data, moving_mean=mean, moving_var=var, name="a")
    second = mx.sym.BatchNorm(first, moving_mean=mean, moving_var=var, eps=0.5, name="b")
    params = norms(rng, "a", "b")
    _, _, report = convert_files(second, params, to="scratch")
    assert [entry.path for entry in report.converted] == ["a"]
    assert "shares its running statistics" in report.skipped[0].text


class Loop(HybridBlock):
    def __init__(self, norm):
        super().__init__(prefix="loop_")
        with self.name_scope():
            self.norm = norm(in_channels=3)

    def hybrid_forward(self, F, x):
        return F.contrib.foreach(lambda item, state: (self.norm(item), state), x, [])[0]


@pytest.mark.parametrize("to", LAYERS)
def test_a_norm_inside_a_loop_is_kept(to):
    net = Loop(LAYERS[OTHER[to]])
    with use_backend("portable"):  # as what export writes
        symbol = net(mx.sym.var("data"))
    ends = ("gamma", "beta", "running_mean", "running_var")
    params = {f"loop_batchnorm0_{end}": mx.nd.ones(3) for end in ends}
    converted, _, report = convert_files(symbol, params, to=to)
    assert "inside a loop" in report.skipped[0].text
    assert operators(converted) == operators(symbol)


def test_bad_input(rng):
    symbol, params = mx.sym.BatchNorm(mx.sym.var("data"), name="bn"), norms(rng, "bn")
    with pytest.raises(ValueError, match="to must be one of builtin, scratch, got 'ours'"):
        convert_files(symbol, params, to="ours")
    with pytest.raises(TypeError, match="params"):
        convert_files(symbol, [1], to="scratch")
    without = {name: value for name, value in params.items() if name != "bn_moving_var"}
    with pytest.raises(ValueError, match="'bn_moving_var' of node 'bn' is missing"):
        convert_files(symbol, without, to="scratch")
    with pytest.raises(ValueError, match=r"parameters of 'bn' must have one shape"):
        convert_files(symbol, {**params, "bn_beta": mx.nd.ones(4)}, to="scratch")
    with pytest.raises(ValueError, match=r"bn \(BatchNorm\) cannot be converted: momentum"):
        convert_files(
            mx.sym.BatchNorm(mx.sym.var("data"), name="bn", momentum=1.5), params, to="scratch"
        )


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LAYERS)
def test_command(to, rng, tmp_path, capsys):
    net = lenet(LAYERS[OTHER[to]], prefix="lenet_")
    initialize(net)
    export(net, tmp_path / "net", rng, (2, 1, 16, 16), "float32")
    files = [str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")]
    out = str(tmp_path / "out")
    assert cli.main(["convert", *files, "--to", to, "--out", out, "--all"]) == 0
    said = capsys.readouterr().out
    assert "3 converted, 0 skipped" in said
    assert f"now {LAYERS[to].__name__}" in said
    assert "give --shape data=" in said
    shape = ["--shape", "data=2,1,16,16"]
    assert cli.main(["convert", *files, "--to", to, "--out", out, *shape]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 converted, 0 skipped (--all shows them)"
    line = next(s for s in lines if s.startswith("largest"))
    difference, size = line.rpartition(": ")[2].split(", of ")
    assert float(difference) < 1e-5 * float(size)
    assert operators(mx.sym.load(f"{out}-symbol.json")).count("BatchNorm") == (
        3 if to == "builtin" else 0
    )


def test_command_with_bad_input(rng, tmp_path, capsys):
    net = sequential(lambda: ScratchBatchNorm(momentum=None))
    export(net, tmp_path / "net", rng, (4, 2), "float32")
    files = [str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")]
    arguments = ["convert", *files, "--to", "builtin", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "momentum=None has no counterpart" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert cli.main([*arguments, "--shape", "date=1,2"]) == 1
    assert "--shape must name an input of the symbol, got 'date'" in capsys.readouterr().err
