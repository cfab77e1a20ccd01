"""Which device a name resolves to: a GPU after a kernel ran on it, or an error that says why."""

import warnings

from scratchbn.environment import device
from scratchbn.environment.device import DeviceError, resolve_device
from scratchbn.environment.driver import GPU, Driver
from scratchbn.environment.install import install_command

import mxnet as mx
import pytest
from pretended_machine import H100, NO_DRIVER, T4, machine


@pytest.mark.parametrize(
    "spec", ["", "cuda", "GPU", "gpu:", "gpu:-1", "gpu:x", "auto:1", "cpu:0:1", " cpu", "gpu:1\n"]
)
def test_an_unknown_device_is_refused_by_name(spec):
    with pytest.raises(ValueError, match="'auto', 'cpu', 'cpu:N', 'gpu' or 'gpu:N'") as caught:
        resolve_device(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("spec", [None, 0, mx.cpu()])
def test_a_device_that_is_no_string_is_refused(spec):
    with pytest.raises(TypeError, match="device must be a string") as caught:
        resolve_device(spec)
    assert repr(spec) in str(caught.value)


def test_cpu_specs():
    assert resolve_device("cpu") == mx.cpu(0)
    assert resolve_device("cpu:1") == mx.cpu(1)


def test_gpu_specs_after_a_kernel_ran(monkeypatch):
    second = GPU(1, "RTX 4090", (8, 9))
    machine(monkeypatch, driver=Driver("12.2", (T4, second), None))
    assert resolve_device("gpu") == mx.gpu(0)
    assert resolve_device("gpu:1") == mx.gpu(1)


@pytest.mark.parametrize(
    ("spec", "pretended", "expected"),
    [
        (
            "gpu",
            {"driver": NO_DRIVER, "cuda": False, "wheel": "mxnet"},
            [
                "mxnet is built without CUDA (installed: mxnet 1.9.1)",
                "pip uninstall -y mxnet, then " + install_command("cu112"),
            ],
        ),
        ("gpu", {"driver": NO_DRIVER}, ["no NVIDIA driver (libcuda.so.1: cannot open)"]),
        (
            "gpu:1",
            {"driver": Driver("12.2", (T4,), None)},
            ["index 1 is out of range", "GPU 0 (Tesla T4, compute capability 7.5)"],
        ),
        (
            "gpu:1",
            {"driver": Driver("12.2", (T4, H100), None)},
            [
                "no code for GPU 1 (H100 PCIe, compute capability 9.0)",
                "5.0, 6.0, 7.0, 8.0, 8.6",
                "no PTX",
            ],
        ),
        (
            "gpu",
            {"driver": Driver("12.2", (T4,), None), "kernels": {0: "CUDA: out of memory"}},
            ["a first kernel on GPU 0 (Tesla T4, compute capability 7.5) failed", "out of memory"],
        ),
    ],
)
def test_an_unusable_gpu_is_an_error_that_says_why(monkeypatch, spec, pretended, expected):
    machine(monkeypatch, **pretended)
    with pytest.raises(DeviceError) as caught:
        resolve_device(spec)
    text = str(caught.value)
    assert text.startswith(f"device '{spec}' cannot be used: ")
    assert [part for part in expected if part not in text] == []


def test_a_build_of_unknown_contents_is_judged_by_its_first_kernel(monkeypatch):
    driver = Driver("12.2", (GPU(0, "H100 PCIe", (9, 0)),), None)
    machine(monkeypatch, driver=driver, wheel="mxnet")
    assert resolve_device("gpu") == mx.gpu(0)


def test_auto_takes_the_first_gpu_that_works(monkeypatch):
    cards = (GPU(0, "H100 PCIe", (9, 0)), GPU(1, "A100", (8, 0)), GPU(2, "A100", (8, 0)))
    machine(monkeypatch, driver=Driver("12.2", cards, None), kernels={1: "CUDA: busy"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("auto") == mx.gpu(2)


def test_auto_falls_back_to_the_cpu_and_says_why_a_gpu_is_left_idle(monkeypatch):
    driver = Driver("12.2", (T4, H100), None)
    machine(monkeypatch, driver=driver, kernels={0: "CUDA: busy"})
    with pytest.warns(RuntimeWarning, match=r"is the CPU: .*CUDA: busy; .*no code for GPU 1"):
        assert resolve_device() == mx.cpu(0)


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_quietly_the_cpu_where_there_is_no_gpu(monkeypatch, cuda):
    machine(monkeypatch, driver=NO_DRIVER, cuda=cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("auto") == mx.cpu(0)


@pytest.mark.skipif(device._built_with_cuda(), reason="needs an mxnet without CUDA")
def test_first_kernel_fails_for_real_without_cuda(monkeypatch):
    assert "the CUDA runtime sees 0 GPUs" in device._kernel_failure(0)
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 1)
    assert "is not implemented for GPU" in device._kernel_failure(0)


def test_first_kernel_is_checked_by_value(monkeypatch):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 1)
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    assert device._kernel_failure(0) is None
    monkeypatch.setattr(mx.nd, "ones", lambda shape, ctx: mx.nd.zeros(shape, ctx=ctx))
    assert device._kernel_failure(0) == "1 + 1 gave [1.0, 1.0]"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((3, 5), False),
        ((5, 0), True),
        ((5, 2), True),
        ((6, 1), True),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), False),
        ((12, 0), False),
    ],
)
def test_wheel_code_runs_within_a_major_version(capability, runs):
    assert device.wheel_runs(capability) is runs
