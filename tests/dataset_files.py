"""Tiny data sets as files, and a place where nothing else can be found."""

import gzip
import hashlib
import os
import socket
import struct
from dataclasses import replace

from scratchbn.datasets.sources import SOURCES

import numpy as np

REAL_SOURCES = dict(SOURCES)
NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}


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


def close_off(monkeypatch, cache):
    """Give a test its own cache, tiny known sets, and mirrors that refuse at once."""
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SCRATCHBN_DATA", raising=False)
    monkeypatch.setenv("SCRATCHBN_CACHE", str(cache))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    for name, files in (("mnist", MNIST), ("fashion", FASHION)):
        source = replace(REAL_SOURCES[name], mirrors=(nowhere,), sha256=hashes(files), folders=())
        monkeypatch.setitem(SOURCES, name, source)
