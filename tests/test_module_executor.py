"""An exported net under the symbolic executor, which can run parts of its forward again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

TRAIN_ONCE = """
import json, sys
import scratchbn
import mxnet as mx
from mxnet.gluon import nn

net = nn.HybridSequential(prefix="net_")
with net.name_scope():
    norm = scratchbn.ScratchBatchNorm
    net.add(nn.Dense(4), norm(), nn.Activation("tanh"), norm(), nn.Dense(2))
net.initialize(mx.init.Constant(0.25))
net.hybridize()
x = mx.nd.array([[1, 2, 3], [4, -5, 6], [-7, 8, 9], [2, 0, 1]])
net(x)
net.export(sys.argv[1])

symbol, arguments, states = mx.model.load_checkpoint(sys.argv[1], 0)
module = mx.mod.Module(mx.sym.SoftmaxOutput(symbol, name="softmax"))
module.bind([("data", x.shape)], [("softmax_label", (4,))])
module.set_params(arguments, states)
module.init_optimizer()
module.forward(mx.io.DataBatch([x], [mx.nd.array([0, 1, 1, 0])]), is_train=True)
module.backward()
module.update()
print(json.dumps({k: v.asnumpy().tolist() for k, v in module.get_params()[1].items()}))
"""


@pytest.mark.parametrize("mirror", ["0", "1"])
def test_module_moves_the_statistics_once(tmp_path, mirror):
    environment = {**os.environ, "MXNET_BACKWARD_DO_MIRROR": mirror}
    command = [sys.executable, "-c", TRAIN_ONCE, str(tmp_path / "net")]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    states = json.loads(run.stdout.splitlines()[-1])
    hidden = 0.25 * np.array([6.0, 5.0, 10.0, 3.0])  # x times a weight of constants, no bias
    np.testing.assert_allclose(states["net_batchnorm0_running_mean"], [0.1 * hidden.mean()] * 4)
    np.testing.assert_allclose(
        states["net_batchnorm0_running_var"], [0.9 + 0.1 * hidden.var()] * 4, rtol=1e-6
    )
