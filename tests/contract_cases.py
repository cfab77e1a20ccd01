"""What several files of the contract use: marks, and the state of a layer."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import pytest
from helpers import BLOCK_MODES, MODES, STATE

both_layers = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
every_mode = pytest.mark.parametrize("mode", MODES)
every_block_mode = pytest.mark.parametrize("mode", BLOCK_MODES)


def snapshot(layer):
    mx.nd.waitall()
    return {name: getattr(layer, name).data().asnumpy() for name in STATE}
