"""Data sets in directories: every spelling is read, and what is broken is named and explained."""

from dataclasses import FrozenInstanceError

from scratchbn.datasets import DatasetError, load
from scratchbn.datasets.idx import parse

import numpy as np
import pytest
from dataset_files import FASHION, MNIST, NAMES, close_off, hashes, idx, tiny, write
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """The cache of a test that finds nothing but what it writes there."""
    close_off(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


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


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><title>404</title>", "an HTML page"),
        (b"PK\x03\x04" + bytes(60), "a ZIP archive: unpack it"),
        (MNIST["train-labels"], "found 00000801, the labels in place of the images"),
        (b"5,0,0,0,12\n7,0,0,0,3", "a text file"),
    ],
)
def test_what_a_wrong_file_is(tmp_path, content, kind):
    folder = write(tmp_path / "d", {**MNIST, "train-images": content})
    with pytest.raises(DatasetError, match=f"train-images-idx3-ubyte: expected an IDX .*{kind}"):
        load(folder)


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
    message = r"t10k-images-idx3-ubyte\.gz: expected an intact gzip .* download it again"
    with pytest.raises(DatasetError, match=message):
        load(folder)


def test_missing_files_are_listed(tmp_path):
    folder = write(tmp_path / "d", MNIST)
    (folder / NAMES["train-labels"]).unlink()
    with pytest.raises(DatasetError, match=r"missing train-labels-idx1-ubyte \(each"):
        load(folder)


def test_what_is_there_in_place_of_the_files_is_said(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(DatasetError, match="found nothing there"):
        load(folder)
    for i in range(6):
        (folder / f"{i}.png").touch()
    with pytest.raises(DatasetError, match=r"found 6 other names: 0.png, .*, 3.png, \.\.\.$"):
        load(folder)
    write(folder, {"t10k-labels": MNIST["t10k-labels"]})
    with pytest.raises(DatasetError, match=r"found only t10k-labels-idx1-ubyte$"):
        load(folder)
    below = write(folder / "MNIST" / "raw", MNIST)
    with pytest.raises(DatasetError, match=f"found them in '{below}': name that directory"):
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
    with pytest.raises(ValueError, match=r"directory: did you mean mnist\?"):
        load("mnits")
    (tmp_path / "file.gz").touch()
    with pytest.raises(ValueError, match=f"it is a file, name its directory '{tmp_path}'"):
        load(tmp_path / "file.gz")
    with pytest.raises(ValueError, match=f"there is no '{tmp_path}/nowhere'"):
        load(tmp_path / "nowhere")
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
