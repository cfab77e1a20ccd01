"""The doctor's facts of a machine, and the advice that follows from them."""

import json
import sys
import types
from pathlib import Path

from scratchbn.environment import doctor, prepare, probe
from scratchbn.environment.device import resolve_device
from scratchbn.environment.driver import Driver
from scratchbn.environment.install import install_command

import mxnet as mx
import pytest
from pretended_machine import (
    H100,
    NO_DRIVER,
    T4,
    install_cuda_files,
    machine,
    pretend_installed,
)


def write_mxnet(folder, source):
    (folder / "mxnet").mkdir()
    (folder / "mxnet/__init__.py").write_text(source)


def test_facts_describe_this_machine(monkeypatch):
    monkeypatch.setenv("MXNET_ENGINE_TYPE", "ThreadedEngine")
    monkeypatch.setenv("UNRELATED", "1")
    facts = doctor.doctor_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["mxnet"]["version"] == mx.__version__
    assert facts["mxnet"]["error"] is None
    assert facts["mxnet"]["features"]["MKLDNN"] is mx.runtime.Features().is_enabled("MKLDNN")
    assert facts["environment"]["MXNET_ENGINE_TYPE"] == "ThreadedEngine"
    assert "UNRELATED" not in facts["environment"]
    assert facts["device"]["auto"] == str(resolve_device("auto"))
    assert facts["packages"]["hypothesis"] == prepare.metadata.version("hypothesis")
    assert set(facts["data"]) >= {"mnist", "sample"}


def test_facts_survive_an_mxnet_that_kills_its_process(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mxnet = doctor.doctor_facts()["mxnet"]
    assert "died of SIGILL: this CPU lacks instructions" in mxnet["error"]
    assert (mxnet["version"], mxnet["features"]) == (None, {})


def test_facts_explain_an_mxnet_that_cannot_be_imported(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "raise OSError('libgomp.so.1: cannot open shared object file: none')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    facts = doctor.doctor_facts()
    assert facts["mxnet"]["error"].startswith("OSError: libgomp.so.1: cannot open")
    assert "apt-get install libgomp1" in facts["advice"][0]
    assert facts["device"] is None


def test_facts_report_an_mxnet_that_hangs(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(probe, "_SECONDS", 1)
    assert doctor.doctor_facts()["mxnet"]["error"] == "import mxnet did not finish within 1 s"


def pretend_probe(monkeypatch, **changes):
    facts = {
        "version": "1.9.1",
        "path": "/somewhere/mxnet",
        "features": {"CUDA": True},
        "device": {"auto": "cpu(0)", "because": "the card is busy"},
        "backend": {"chosen": "auto", "problem": None, "inference_graph": "on"},
        "error": None,
        "help": None,
    }
    monkeypatch.setattr(doctor, "probe_mxnet", lambda: facts | changes)


@pytest.mark.parametrize("switched, said", [("on", "graph of its own"), ("off", "switched off")])
@pytest.mark.parametrize("problem", [None, "not built"])
def test_facts_tell_what_auto_means(monkeypatch, switched, said, problem):
    machine(monkeypatch, driver=Driver(None, (), "no driver"))
    backend = {"chosen": "auto", "problem": problem, "inference_graph": switched}
    pretend_probe(monkeypatch, backend=backend)
    kernel = {"library": None, "compiler": None, "problem": None}
    monkeypatch.setattr(doctor.native, "facts", lambda: kernel)
    means = doctor.doctor_facts()["backend"]["auto_means"]
    assert said in means["inference"]
    assert ["kernel" in means[where] for where in ("training", "eager")] == [problem is None] * 2


def test_facts_tell_which_gpus_the_wheel_can_run(monkeypatch):
    machine(monkeypatch, driver=Driver("12.2", (T4, H100), None))
    pretend_probe(monkeypatch)
    facts = doctor.doctor_facts()
    verdicts = [(gpu["name"], gpu["wheel_runs"]) for gpu in facts["cuda"]["gpus"]]
    assert verdicts == [("Tesla T4", True), ("H100 PCIe", False)]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cuda"]["driver_supports"] == "12.2"
    assert facts["advice"] == ["2 GPU(s) present and none used: the card is busy"]


def test_facts_advise_the_cuda_wheel_where_there_is_a_gpu(monkeypatch):
    machine(monkeypatch, driver=Driver("12.2", (T4,), None), wheel="mxnet")
    pretend_probe(monkeypatch, features={"CUDA": False})
    (advice,) = doctor.doctor_facts()["advice"]
    assert "mxnet is built without CUDA (installed: mxnet 1.9.1)" in advice
    assert install_command("cu112") in advice


@pytest.mark.parametrize(
    ("supports", "fusion", "advised"),
    [
        ("11.7", None, True),
        ("11.0", "1", True),
        ("11.7", "0", False),
        ("11.8", None, False),
        ("12.2", None, False),
        ("13.0", None, False),
    ],
)
def test_facts_advise_a_driver_that_knows_fused_kernels(monkeypatch, supports, fusion, advised):
    machine(monkeypatch, driver=Driver(supports, (T4,), None))
    pretend_probe(monkeypatch, device={"auto": "gpu(0)", "because": "it ran a kernel"})
    monkeypatch.delenv("MXNET_USE_FUSION", raising=False)
    if fusion is not None:
        monkeypatch.setenv("MXNET_USE_FUSION", fusion)
    advice = doctor.doctor_facts()["advice"]
    if not advised:
        assert advice == []
        return
    (line,) = advice
    assert f"the driver supports CUDA {supports}" in line
    assert "install driver 520.61.05 or newer, or set MXNET_USE_FUSION=0" in line


@pytest.mark.parametrize("driver", [NO_DRIVER, Driver("11.2", (), "lists no GPU")])
def test_without_a_card_no_driver_is_advised(monkeypatch, driver):
    machine(monkeypatch, driver=driver)
    pretend_probe(monkeypatch)
    assert doctor.doctor_facts()["advice"] == []


def test_facts_report_two_distributions_in_one_place(monkeypatch):
    pretend_installed(monkeypatch, mxnet="1.9.1", mxnet_cu112="1.9.1")
    monkeypatch.setattr(doctor, "query_driver", lambda: NO_DRIVER)
    pretend_probe(monkeypatch)
    facts = doctor.doctor_facts()
    assert facts["mxnet"]["distributions"] == {"mxnet": "1.9.1", "mxnet-cu112": "1.9.1"}
    (advice,) = facts["advice"]
    assert "mxnet and mxnet-cu112 are both installed" in advice


def test_facts_give_cuda_libraries_with_their_versions(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcudnn.so.8")
    metadata = tmp_path / "nvidia_cudnn_cu11-8.9.6.50.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nvidia-cudnn-cu11\nVersion: 8.9.6.50\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    pretend_probe(monkeypatch)
    library = doctor.doctor_facts()["cuda"]["libraries"]["libcudnn.so.8"]
    assert library["version"] == "8.9.6.50"
    assert Path(library["path"]) == tmp_path / "nvidia/cudnn/lib/libcudnn.so.8"


def test_facts_survive_data_that_cannot_be_listed(monkeypatch):
    monkeypatch.setattr(doctor, "datasets", types.ModuleType("scratchbn.datasets"))
    pretend_probe(monkeypatch)
    assert "has no attribute 'available'" in doctor.doctor_facts()["data"]["error"]
