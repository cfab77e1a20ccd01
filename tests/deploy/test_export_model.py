"""The export script: every form of a net, compared, and nothing half-written."""

import importlib.util
import json
import sys

import helpers
import matplotlib.image
import mxnet as mx
import numpy as np
import pytest

from models.lenet import initialize, lenet


@pytest.fixture(scope="module")
def script():
    path = helpers.REPOSITORY / "scripts" / "export_model.py"
    spec = importlib.util.spec_from_file_location("export_model", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


MXNET_FORMS = ["training", "builtin", "inference-dwconv", "inference-affine", "inference-batchnorm"]


@pytest.fixture(scope="module")
def exported(script, tmp_path_factory):
    """LeNet in all forms; returns the directory and the rows of the report by name."""
    out = tmp_path_factory.mktemp("export")
    assert script.main(["--out", str(out), "--calls", "3", "--batch", "2"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["input"] == [2, 1, 28, 28]
    return out, {row["name"]: row for row in report["rows"]}


def test_every_form_is_written_and_compared(exported):
    out, rows = exported
    pairs = [f"{form}-{end}" for form in MXNET_FORMS for end in ("symbol.json", "0000.params")]
    assert {path.name for path in out.iterdir()} == {
        *pairs,
        "model.onnx",
        "report.json",
        "graph.png",
    }
    for name in [*MXNET_FORMS, "model.onnx"]:
        row = rows[name]
        size = sum(p.stat().st_size for p in out.iterdir() if p.name.startswith(name))
        assert row["size"] == size
        assert 0 <= row["difference"] < 1e-5
        assert row["ms"] > 0
        assert row["note"] == ""
    assert rows["net with nn.BatchNorm"]["ratio"] == 1
    # The twin has the same parameters; only rounding differs, so it is not the same net twice.
    assert 0 < rows["net with nn.BatchNorm"]["difference"] < 1e-5


def test_operators_are_counted(exported):
    out, rows = exported
    for name in MXNET_FORMS:
        nodes = json.loads((out / f"{name}-symbol.json").read_text())["nodes"]
        assert rows[name]["operators"] == sum(node["op"] != "null" for node in nodes)
    assert [rows[n]["operators"] for n in ("builtin", "inference-dwconv")] == [13, 10]


def test_the_picture_is_one(exported):
    out, _ = exported
    picture = matplotlib.image.imread(out / "graph.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_drawn_are_all_operators_and_edges(script, exported):
    from matplotlib.figure import Figure

    out, _ = exported
    nodes, places = script._layout(out / "builtin-symbol.json")
    assert len(set(places.values())) == len(nodes) == 13
    axis = Figure().subplots()
    script._draw(axis, nodes, places)
    texts = [text.get_text() for text in axis.texts]
    assert sum("BatchNorm" in text for text in texts) == 3
    assert {"Convolution 3x3", "Convolution 5x5", "Activation relu"} <= set(texts)
    assert texts.count("") == 12  # arrows are annotations without a text


def test_given_parameters_are_used(script, tmp_path):
    net = lenet()
    initialize(net)
    net(mx.nd.zeros((1, 1, 28, 28)))
    net.save_parameters(str(tmp_path / "lenet.params"))
    nets = script.build_nets("lenet", str(tmp_path / "lenet.params"), 1, (1, 1, 28, 28))
    for twin in (nets.ours, nets.builtin):
        np.testing.assert_allclose(
            twin(nets.x).asnumpy(), net(nets.x).asnumpy(), rtol=1e-5, atol=1e-7
        )


def test_a_zoo_net(script, tmp_path, capsys):
    arguments = ["--net", "cifar_resnet20_v1", "--size", "16", "--calls", "1"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "cifar_resnet20_v1, input 1x3x16x16" in capsys.readouterr().out


def test_a_form_that_is_wrong_fails(script, tmp_path, monkeypatch, capsys):
    export = script.export_inference

    def export_wrong(net, prefix, *inputs, style):
        wrong = lenet(prefix="lenet_")
        wrong.initialize(mx.init.Xavier())
        wrong(*inputs)
        return export(wrong if style == "affine" else net, prefix, *inputs, style=style)

    monkeypatch.setattr(script, "export_inference", export_wrong)
    assert script.main(["--out", str(tmp_path), "--calls", "1"]) == 1
    assert "inference-affine differs by" in capsys.readouterr().err


def test_without_onnx_the_row_says_so(script, tmp_path, monkeypatch):
    def no_onnx(*args, **options):
        raise ImportError("export_onnx needs onnx")

    monkeypatch.setattr(script, "export_onnx", no_onnx)
    assert script.main(["--out", str(tmp_path), "--calls", "1"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows[-1]["note"] == "export_onnx needs onnx"
    assert rows[-1]["difference"] is None


def test_an_error_leaves_no_files(script, tmp_path, monkeypatch):
    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(script, "draw_graphs", broken)
    (tmp_path / "report.json").write_text("before")
    with pytest.raises(OSError, match="disk full"):
        script.main(["--out", str(tmp_path), "--calls", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "before"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--net", "lennet"], "'lennet'"),
        (["--size", "3"], "input of shape (1, 1, 3, 3)"),
        (["--params", "nowhere.params"], "nowhere.params"),
    ],
)
def test_bad_input(script, arguments, said, tmp_path, capsys):
    assert script.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--calls", "--batch", "--size"])
def test_bad_numbers(script, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main([option, "0"])
    assert stopped.value.code == 2
    assert f"argument {option}: must be at least 1, got '0'" in capsys.readouterr().err


def test_parameters_of_another_net_are_refused(script, tmp_path, capsys):
    mx.nd.save(str(tmp_path / "other.params"), {"weight": mx.nd.ones(3)})
    arguments = ["--params", str(tmp_path / "other.params"), "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 2
    assert "other.params" in capsys.readouterr().err
