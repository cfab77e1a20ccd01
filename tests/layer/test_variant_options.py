"""The variants' options: what is refused and why, `repr`, and the examples of their document."""

from __future__ import annotations

import re

from scratchbn.variants import BatchRenorm, GhostBatchNorm

import mxnet as mx
import pytest
from helpers import REPOSITORY


@pytest.mark.parametrize(
    "layer",
    [
        GhostBatchNorm(32, axis=-1, momentum=None, in_channels=3),
        BatchRenorm(1.5, 0.25, epsilon=1e-3, center=False, gamma_initializer=mx.init.One()),
    ],
)
def test_repr_rebuilds_the_layer(layer):
    text = repr(layer)
    assert repr(eval(text)) == text
    assert re.match(r"GhostBatchNorm\(ghost_size=32, |BatchRenorm\(r_max=1.5, d_max=0.25, ", text)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: GhostBatchNorm(0), ValueError, "ghost_size must be at least 1, got 0"),
        (lambda: GhostBatchNorm(2.0), TypeError, "ghost_size must be an integer, got 2.0"),
        (lambda: GhostBatchNorm(2, axis=0), ValueError, "axis must not be 0"),
        (lambda: GhostBatchNorm(2, momentum=2), ValueError, "momentum"),
        (lambda: BatchRenorm(0.5), ValueError, "r_max must be finite and at least 1, got 0.5"),
        (lambda: BatchRenorm(d_max=-1), ValueError, "d_max must be finite and at least 0, got -1"),
        (lambda: BatchRenorm(float("inf")), ValueError, "r_max must be finite.*got inf"),
        (lambda: BatchRenorm("3"), TypeError, "r_max must be a number, got '3'"),
    ],
)
def test_bad_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_bad_limit_changes_nothing():
    layer = BatchRenorm(2, 1)
    with pytest.raises(ValueError, match=r"r_max must be finite and at least 1, got 0\.1"):
        layer.r_max = 0.1
    with pytest.raises(TypeError, match="d_max must be a number, got None"):
        layer.d_max = None
    assert (layer.r_max, layer.d_max) == (2, 1)


def test_ghost_batches_need_samples(device):
    layer = GhostBatchNorm(2, axis=-2, in_channels=4)
    layer.initialize(ctx=device)
    with pytest.raises(ValueError, match=r"axis=-2 is the batch axis of data of shape \(4, 3\)"):
        layer(mx.nd.zeros((4, 3), ctx=device))
    mx.npx.set_np()
    with pytest.raises(ValueError, match=r"at least 1 sample, got shape \(0, 4, 3\)"):
        layer(mx.np.zeros((0, 4, 3), ctx=device))


def test_the_examples_of_the_document_run():
    page = REPOSITORY / "docs" / "your-own-variant.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) >= 3
    names = {"__name__": "document"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
