"""Random graphs through convert, back, fold and the inference file: the same comes out.

The graphs are those of `random_graphs`. ``SCRATCHBN_CORPUS`` is their number.
"""

import json
import os
import re

from scratchbn import convert_files
from scratchbn.deploy import fold, load_params, load_symbol, write_model
from scratchbn.deploy._lower import STYLES
from scratchbn.deploy.check import compare_outputs, run_symbol

import mxnet as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from inference_files import inferring
from random_graphs import graphs

GRAPHS = int(os.environ.get("SCRATCHBN_CORPUS", 60))
EXACT = {"float32": 2e-4, "float64": 1e-9}


def aged(symbol, key):
    """Return a symbol's JSON as former versions of MXNet, and Python 2, wrote it."""
    document = json.loads(symbol.tojson())
    for node in document["nodes"]:
        attrs = node.pop("attrs", {})
        hidden = {name: value for name, value in attrs.items() if name.startswith("__")}
        own = {name: value for name, value in attrs.items() if name not in hidden}
        for name in {"kernel", "pad", "stride", "num_filter", "num_hidden", "axis"} & own.keys():
            own[name] = re.sub(r"(\d+)", r"\1L", own[name])
        node[key] = own
        if hidden:
            node["attr"] = {**node.get("attr", {}), **hidden}
    document["attrs"] = {"mxnet_version": ["int", 10000]}
    return json.dumps(document)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@settings(
    max_examples=GRAPHS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(
    graph=graphs(),
    age=st.sampled_from([None, None, "attr", "param"]),
    style=st.sampled_from(STYLES),
    stated=st.booleans(),
)
def test_random_graphs(place, graph, age, style, stated):
    symbol, params, inputs, dtype = graph
    names = symbol.list_outputs()
    try:
        expected = run_symbol(symbol, params, inputs)
    except ValueError:
        assume(False)  # MXNet itself does not run it
    assume(all(np.isfinite(y).all() for y in expected))
    if age:
        path = place / "old-symbol.json"
        path.write_text(aged(symbol, age))
        symbol = load_symbol(path)
    shapes = {name: array.shape for name, array in inputs.items() if name in symbol.list_inputs()}
    options = {"shapes": shapes if stated else None, "style": style}

    def check(title, model, other):
        arrays = {name: inputs[name] for name in inputs if name in model.list_inputs()}
        outputs = run_symbol(model, other, arrays)
        assert model.list_outputs() == names, title
        assert [y.shape for y in outputs] == [y.shape for y in expected], title
        assert [y.dtype for y in outputs] == [y.dtype for y in expected], title
        for i, (one, y) in enumerate(zip(outputs, expected)):
            difference, size = compare_outputs([one], [y])
            assert difference <= EXACT[dtype] * max(size, 1e-3), (title, i, difference, size)

    known = {"shapes": options["shapes"]}  # whether they are run and compared before
    ours, same, report = convert_files(symbol, params, to="scratch", **known)
    check("converted", ours, same)
    back = convert_files(ours, same, to="builtin", **known)
    check("back", *back[:2])
    assert len(report.converted) == len(back[2].converted)
    for title, model in (("folded", (symbol, params)), ("converted, folded", (ours, same))):
        folded, fewer, _ = fold(*model, **options)
        check(title, folded, fewer)
        assert "sgd_mom_update" not in folded.tojson()
    for title, model in (("infers", (symbol, params)), ("converted, infers", (ours, same))):
        check(title, *inferring(*model, place, **known))
    write_model(place / "out", folded, fewer)
    symbol = mx.sym.load(str(place / "out-symbol.json"))
    check("written", symbol, load_params(place / "out-0000.params"))
