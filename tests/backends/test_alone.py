"""The kernel is alone in its process: loading it leaves what others have put on MXNet in place."""

import pytest
from helpers import last_json, run_python

SETUP = """
import json, warnings
warnings.simplefilter("ignore")
import scratchbn
import mxnet as mx
from mxnet.gluon import nn
from scratchbn import native

MODULES = [mx.nd, mx.nd.op, mx.nd._internal, mx.nd.contrib, mx.nd.linalg, mx.nd.random, mx.nd.image,
           mx.nd.sparse, mx.sym, mx.sym.op, mx.sym._internal, mx.sym.contrib, mx.sym.linalg,
           mx.sym.random, mx.sym.image, mx.sym.sparse, mx.np, mx.npx]

def contents():
    return {module.__name__: dict(vars(module)) for module in MODULES}

def changed(before):
    after = contents()
    return sorted(
        f"{module}.{name}"
        for module in after
        for name in {*before[module], *after[module]}
        if before[module].get(name) is not after[module].get(name)
    )
"""


@pytest.fixture(autouse=True)
def built():
    from scratchbn import BackendError, native

    try:
        native.build()
    except BackendError as error:
        pytest.skip(str(error))


def test_loading_adds_one_operator_and_nothing_else():
    program = f"{SETUP}before = contents(); native.load(); print(json.dumps(changed(before)))"
    assert last_json(run_python(program)) == [
        "mxnet.ndarray._internal._scratchbn_batch_norm",
        "mxnet.symbol._internal._scratchbn_batch_norm",
    ]


def test_a_function_that_somebody_replaced_stays_replaced():
    program = f"""{SETUP}
mine = lambda *args, **kwargs: "mine"
mx.nd.FullyConnected = mx.nd.op.FullyConnected = mx.sym.FullyConnected = mine
mx.nd.contrib.box_nms = mine
native.load()
found = [mx.nd.FullyConnected, mx.nd.op.FullyConnected, mx.sym.FullyConnected]
found += [mx.nd.contrib.box_nms]
print(json.dumps([function is mine for function in found]))
"""
    assert last_json(run_python(program)) == [True] * 4


CALL = """
net = nn.HybridSequential()
net.add(scratchbn.ScratchBatchNorm(in_channels=4))
net.initialize()
net.hybridize()
net(mx.nd.ones((2, 4))).wait_to_read()
"""


@pytest.mark.parametrize(
    ("dtype", "load"),
    [("float16", "native.load()"), ("bfloat16", "native.load()"), ("float16", CALL)],
)
def test_amp_stays_in_force(dtype, load):
    """The first hybridized call of a layer of ours loads the kernel."""
    program = f"""{SETUP}
from mxnet.contrib import amp
amp.init(target_dtype="{dtype}")
before = contents()
{load}
layer = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=3)
casts = layer.tojson(remove_amp_cast=False).count('"amp_cast"')
print(json.dumps([casts, changed(before)]))
"""
    casts, names = last_json(run_python(program))
    assert casts > 0
    assert all(name.endswith("._scratchbn_batch_norm") for name in names)
    assert len(names) == 2


def test_importing_the_package_leaves_mxnet_as_it_is():
    """Modules that both programs have imported hold the same names."""
    list_names = (
        "import json, mxnet as mx; print(json.dumps([sorted(vars(m)) for m in "
        "(mx, mx.nd, mx.sym, mx.gluon, mx.gluon.nn, mx.gluon.block, mx.autograd)]))"
    )
    with_us = "import scratchbn; scratchbn.ScratchBatchNorm; "
    prepared = "import scratchbn.environment.prepare as p; p.prepare(); "
    plain = last_json(run_python(prepared + list_names))
    assert last_json(run_python(with_us + list_names)) == plain
