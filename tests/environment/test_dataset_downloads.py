"""Downloads of data sets: checked, cached, given up in seconds, and explained where they fail."""

import gzip
import os
import re
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scratchbn.datasets import DatasetError, available, downloads, load
from scratchbn.datasets.sources import SOURCES
from scratchbn.environment.install import install_command

import pytest
from dataset_files import FASHION, MNIST, NAMES, close_off, digest, hashes, listing, write


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """The cache of a test that finds nothing but what it writes there."""
    close_off(monkeypatch, tmp_path / "cache")
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


def test_available_tells_everything_without_the_network(closed, mirror, monkeypatch):
    (server,) = mirror(zipped(MNIST))
    write(closed / "fashion", FASHION)
    found = available()
    assert found["mnist"].startswith("not found: ")
    assert found["fashion"] == str(closed / "fashion")
    assert "mnist_5k.csv.gz" in found["sample"]
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
        with pytest.raises(DatasetError) as caught:
            load("mnist", log=lines.append)
        assert time.monotonic() - start < 6
    assert lines == []
    assert str(caught.value).count("no answer within 4 s") == 3


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
    with pytest.raises(DatasetError, match=re.escape(f"needs pooch ({install_command('demo')})")):
        load("mnist")
