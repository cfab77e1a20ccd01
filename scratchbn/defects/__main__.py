"""Measure one defect: ``python -m scratchbn.defects KEY NORM MODE DEVICE_TYPE DEVICE_ID``."""

from __future__ import annotations

import dataclasses
import json
import sys

import mxnet as mx

from . import DEFECTS, Bench

key, norm, mode, device_type, device_id = sys.argv[1:]
outcome = DEFECTS[key].measure(Bench(norm, mode, mx.Context(device_type, int(device_id))))
print(json.dumps(dataclasses.asdict(outcome)), flush=True)
mx.nd.waitall()  # a fault of the engine ends this process even now
