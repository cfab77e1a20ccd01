"""What nets with two graphs are tested with: the backend 'auto', with the kernel and without."""

from scratchbn import native, use_backend
from scratchbn.backends.inference import switch

import pytest


@pytest.fixture
def chosen(device, monkeypatch):
    if device.device_type != "cpu":
        pytest.skip("the second graph is for CPUs")
    monkeypatch.setattr(switch, "_chosen", None)
    monkeypatch.delenv("SCRATCHBN_INFERENCE_GRAPH", raising=False)
    with use_backend("auto"):
        yield


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request, monkeypatch):
    """With the compiled operator in the block's own graph, and without."""
    if request.param == "no kernel":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the kernel has not been built")
    return request.param
