"""What a child process checks: `python sync_cases.py NAME...` prints a JSON line for each."""

import copy
import gc
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from pathlib import Path

import scratchbn
from scratchbn._devices import failure
from scratchbn.sync import abandon

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon.contrib.nn import SyncBatchNorm
from sync_nets import FORMS, Pair, ScratchSyncBatchNorm, build

SIZES = {
    "eager": [(3, 2), (1, 4, 2), (2, 2, 3, 1)],
    "hybrid": [(3, 2), (2, 2, 3, 1)],
    "static_alloc": [(1, 4, 2)],
    "static_shape": [(1, 4, 2), (2, 2, 3, 1)],
}


def error_of(array):
    try:
        array.asnumpy()
    except mx.MXNetError as error:
        mx_clear()
        return str(error)
    return "no error"


def mx_clear():
    while True:
        try:
            return mx.nd.waitall()
        except mx.MXNetError:
            continue


def equal():
    """Every form, number of devices, order of the backwards."""
    orders = ["loop", "together", "reversed"]
    result = {}
    for form in FORMS:
        for sizes in SIZES[form]:
            pair = Pair(sizes, form)
            result[f"{form} {sizes}"] = max(pair.step(order) for order in orders)
            inputs = pair.parts(pair.batch()[0])
            one = mx.nd.array(inputs[0].asnumpy(), dtype="float64")
            apart = pair.shared(inputs[0]).asnumpy() - pair.single(one).asnumpy()
            result[f"{form} {sizes} inference"] = float(np.abs(apart).max())
    return result


def options():
    """Layers that are used twice in a step, several nets at a time, options."""
    result = {}
    for form in ("eager", "static_shape"):
        result[f"{form} called twice"] = max(Pair((3, 2), form, calls=2).step() for _ in range(2))
        for name, kind in {
            "unbiased": {"unbiased_variance": True},
            "cumulative": {"momentum": None},
            "global": {"use_global_stats": True},
            "fixed": {"scale": False, "center": False},
        }.items():
            pair = Pair((1, 3), form, **kind)
            result[f"{form} {name}"] = max(pair.step(), pair.step())
        nets = [Pair((2, 3), form, seed=i) for i in range(2)]
        result[f"{form} two nets"] = max(nets[i % 2].step() for i in range(4))
    return result


def far():
    """float32 data at a mean of 1e5, that of each device another."""
    layer = ScratchSyncBatchNorm(in_channels=2)
    layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    rng = np.random.default_rng(1)
    X = [rng.normal(1e5 + i, 1, (500, 2)).astype(np.float32) for i in (0, 3)]
    with autograd.record():
        ys = [layer(mx.nd.array(x, mx.cpu(i))) for i, x in enumerate(X)]
    whole = np.concatenate(X).astype(np.float64)
    expected = (whole - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-5)
    return float(np.abs(np.concatenate([y.asnumpy() for y in ys]) - expected).max())


def threads():
    """A thread for each device, as GluonCV's DataParallelModel has them."""
    pair = Pair((3, 2))
    xs, out = pair.parts(pair.batch()[0]), {}

    def run(i):
        with autograd.record():
            y = pair.shared(xs[i])
        y.backward()
        out[i] = y.asnumpy()

    workers = [threading.Thread(target=run, args=(i,)) for i in (1, 0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    x = mx.nd.array(np.concatenate([x.asnumpy() for x in xs]), dtype="float64")
    with autograd.record():
        y = pair.single(x)
    return float(np.abs(np.concatenate([out[0], out[1]]) - y.asnumpy()).max())


def missing():
    """A device that is not called, in the forward and in the backward; the next step is right."""
    result = {}
    for form in ("eager", "hybrid"):
        pair = Pair((3, 2), form)
        pair.step()
        pair.wait(0.5)
        (x, _), began = pair.parts(pair.batch()[0]), time.monotonic()
        with autograd.record():
            y = pair.shared(x)
        result[f"{form} forward"] = error_of(y)
        result[f"{form} seconds"] = time.monotonic() - began
        pair.wait(None)
        result[f"{form} after"] = pair.step()
        xs = pair.parts(pair.batch()[0])
        for x in xs:
            x.attach_grad()
        before = {k: p.list_data()[0].copy() for k, p in pair.shared.collect_params().items()}
        pair.wait(5)
        with autograd.record():
            ys = [pair.shared(x) for x in xs]
        for y in ys:
            y.wait_to_read()
        ys[1].backward()
        result[f"{form} backward"] = error_of(xs[1].grad)
        pair.wait(None)
        for name, p in pair.shared.collect_params().items():
            p.set_data(before[name])  # the forward moved the statistics of one net only
        result[f"{form} after backward"] = pair.step()
    return result


def abandoned():
    """An exception between the devices of a step."""
    pair = Pair((3, 2, 1), timeout=100)
    pair.step()
    (x, *_), began = pair.parts(pair.batch()[0]), time.monotonic()
    with autograd.record():
        y = pair.shared(x)
    abandon()
    return {"error": error_of(y), "seconds": time.monotonic() - began, "after": pair.step()}


def together():
    """Devices that fail at one moment: the errors, and how far apart MXNet is given them."""
    at, potrf, gate = [], mx.nd.linalg.potrf, threading.Barrier(4)

    def timed(*arguments):
        at.append(time.monotonic())
        return potrf(*arguments)

    def fail(array, text):
        gate.wait()
        failure.put_error([array], text)

    mx.nd.linalg.potrf = timed
    try:
        arrays = [mx.nd.zeros((2,), mx.cpu(i)) for i in range(4)]
        workers = [
            threading.Thread(target=fail, args=(a, f"the text of {i}"))
            for i, a in enumerate(arrays)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        mx.nd.linalg.potrf = potrf
    errors = [error_of(arrays[0] + 1)]
    mx_clear()
    return {"apart": min(b - a for a, b in zip(at, at[1:])), "times": len(at), "errors": errors}


def refused():
    """What ends in an error at once."""
    result = {}
    for name, kind, devices in (
        ("number", {"num_devices": 3}, [mx.cpu(0), mx.cpu(1)]),
        ("one", {"num_devices": 2}, [mx.cpu(0)]),
    ):
        net = build(ScratchSyncBatchNorm, devices, **kind)
        x = mx.nd.ones((2, 2, 4, 5), dtype="float64")
        net(x).wait_to_read()
        try:
            with autograd.record():
                net(x)
        except ValueError as error:
            result[name] = str(error)
        net.hybridize()
        with autograd.record():
            y = net(x)
        result[f"{name} hybrid"] = error_of(y)
    for name, kind in {
        "key": {"key": "a"},
        "num_devices": {"num_devices": 0},
        "timeout": {"timeout": 0},
    }.items():
        try:
            ScratchSyncBatchNorm(**kind)
        except ValueError as error:
            result[name] = str(error)
    return result


def key():
    """Two nets, each on a device of its own, that share by key."""
    layers = [ScratchSyncBatchNorm(1, 2, key="both") for _ in range(2)]
    ys = []
    for i, layer in enumerate(layers):
        layer.initialize(ctx=mx.cpu(i))
        with autograd.record():
            ys.append(layer(mx.nd.array([[1 + 2 * i]], mx.cpu(i))))
    return [y.asnumpy().round(3).tolist() for y in ys]


def files():
    """What is exported, and conversion there and back."""
    result = {}
    pair = Pair((3, 2), "hybrid")
    pair.step()
    with tempfile.TemporaryDirectory() as folder:
        pair.shared.export(str(Path(folder, "net")))
        names = [str(Path(folder, f)) for f in ("net-symbol.json", "net-0000.params")]
        text = Path(names[0]).read_text()
        result["stock"] = "Custom" not in text and "scratchbn_" not in text
        x = pair.batch()[0]
        back = gluon.SymbolBlock.imports(names[0], ["data"], names[1])
        apart = back(mx.nd.array(x, dtype="float64")) - pair.shared(mx.nd.array(x, dtype="float64"))
        result["apart"] = float(np.abs(apart.asnumpy()).max())
        symbol, _, report = scratchbn.convert_files(*names, to="builtin")
        result["nodes"] = symbol.tojson().count('"op": "BatchNorm"'), len(report.converted)
    layer = SyncBatchNorm(in_channels=3, num_devices=2, epsilon=1e-3, scale=False)
    layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    before = dict(layer._kwargs)
    scratchbn.to_scratch(layer)
    result["there"] = repr(layer), type(layer).__name__
    twin = eval(repr(layer), {"ScratchSyncBatchNorm": ScratchSyncBatchNorm})
    result["repr"] = repr(twin) == repr(layer)
    scratchbn.to_builtin(layer)
    result["back"] = type(layer) is SyncBatchNorm and dict(layer._kwargs) == before
    twins = copy.deepcopy(twin), pickle.loads(pickle.dumps(twin._identity))
    result["copies"] = len({twin.serial, *(t.serial for t in twins)})
    return result


def gluoncv():
    """A net of GluonCV's trains on two devices; its export has no trace of it."""
    from gluoncv.model_zoo import get_model

    kind = {"norm_layer": ScratchSyncBatchNorm, "norm_kwargs": {"num_devices": 2}}
    net = get_model("cifar_resnet20_v1", classes=3, **kind)
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    net.hybridize()
    xs = [mx.nd.random.normal(shape=(2, 3, 32, 32), ctx=mx.cpu(i)) for i in range(2)]
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(2):
        with autograd.record():
            losses = [net(x).square().sum() for x in xs]
        autograd.backward(losses)
        trainer.step(4)
    mx.nd.waitall()
    stats = [p for k, p in net.collect_params().items() if "running" in k]
    same = all((p.list_data()[0].asnumpy() == p.list_data()[1].asnumpy()).all() for p in stats)
    return {"layers": len(stats) // 2, "same": bool(same)}


def _child(queue):
    queue.put(float(mx.nd.ones((2,)).sum().asscalar()))


def forks():
    """A fork while devices wait, and nets that are dropped meanwhile."""
    pair = Pair((3, 2), "hybrid")
    pair.step()
    with autograd.record():
        ys = [pair.shared(x) for x in pair.parts(pair.batch()[0])]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_child, args=(queue,))
    worker.start()
    answer = queue.get(timeout=60)
    worker.join(60)
    for y in ys:
        y.wait_to_read()
    del pair, ys
    gc.collect()
    return {"answer": answer, "after": Pair((3, 2)).step(), "exit": worker.exitcode}


if __name__ == "__main__":
    os.environ.setdefault("SCRATCHBN_SYNC_TIMEOUT", "30")
    for case in sys.argv[1:]:
        print(json.dumps({case: globals()[case]()}), flush=True)
