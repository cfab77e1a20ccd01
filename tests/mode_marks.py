"""The marks that run a test in every mode, and with both layers."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import pytest
from helpers import BLOCK_MODES, MODES

every_mode = pytest.mark.parametrize("mode", MODES)
every_block_mode = pytest.mark.parametrize("mode", BLOCK_MODES)
both_layers = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
