"""The examples of docs/deploying.md, run one after another."""

import re
import shlex
from pathlib import Path

from scratchbn import cli

import mxnet as mx
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploying.md"


def blocks(language):
    text = PAGE.read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_document_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "document"}
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        exec(compile(block, PAGE.name, "exec"), names)
    said = capsys.readouterr().out
    assert "largest difference on random input" in said
    assert "net_batchnorm0_fwd(BatchNorm)" in said
    assert len(names["builtin"][2].converted) == len(names["scratch"][2].converted) == 1
    x, y = names["x"], names["y"]
    assert names["int8"](x).shape == y.shape
    assert "amp_cast" in names["half"](mx.sym.var("data")).tojson(remove_amp_cast=False)
    symbol, _, auxiliary = names["half_files"]
    _, _, types = symbol.infer_type(data="float32")
    assert "amp_cast" in symbol.tojson(remove_amp_cast=False)
    assert len(types) == len(auxiliary) == 2
    assert {t.__name__ for t in types} == {"float32"}
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 4
    for line in commands:
        program, *arguments = shlex.split(line)
        assert (program, cli.main(arguments)) == ("scratchbn", 0)
        assert "largest difference on random input" in capsys.readouterr().out
    for name in ("net-infer-symbol.json", "folded-symbol.json", "ours-symbol.json", "net.onnx"):
        assert (tmp_path / name).exists()
    served = mx.gluon.SymbolBlock.imports("net-infer-symbol.json", ["data"], "net-0000.params")
    assert abs(served(x) - y).max() < 1e-4 * abs(y).max()
