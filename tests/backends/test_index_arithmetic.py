"""The kernel's index arithmetic beyond 2^31 elements, without their memory."""

import json
import subprocess
from pathlib import Path

from scratchbn import native

import pytest

SOURCES = Path(native.__file__).parent

# Prints, for a view, the last position of each walk, and how many elements the walk met.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "walk.h"
using namespace scratchbn;
int main(int, char** argument) {
  const View v{atoll(argument[1]), atoll(argument[2]), atoll(argument[3])};
  const int threads = 7;
  int64_t last = 0, met = 0;
  if (v.by_columns()) {
    for (const Tile& tile : tiles(v, threads)) {
      row_blocks<float>(tile, [&](int64_t first, int64_t rows) {
        met += rows * tile.width();
        last = std::max(last, (first + rows - 1) * v.stride() + tile.end - 1);
      });
    }
  } else {
    const int64_t cuts = parts(v, threads);
    for (int64_t c : {int64_t(0), v.C - 1}) {
      for (int64_t part = 0; part < cuts; ++part) {
        blocks(v, c, v.L * part / cuts, v.L * (part + 1) / cuts,
               [&](int64_t at, int64_t runs, int64_t n) {
                 met += runs * n;
                 last = std::max(last, at + (runs - 1) * v.stride() + n - 1);
               });
      }
    }
  }
  printf("[%lld, %lld, %lld, %d]\n", (long long)v.m(), (long long)last, (long long)met, v.empty());
}
"""


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("walk")
    (folder / "walk.cc").write_text(PROGRAM)
    trap = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", *trap, f"-I{SOURCES}"]
    subprocess.run(
        [native.compiler(), *flags, str(folder / "walk.cc"), "-o", str(folder / "walk")], check=True
    )

    def run(*view):
        command = [str(folder / "walk"), *map(str, view)]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    return run


@pytest.mark.parametrize(
    ("L", "C", "S"),
    [
        (2, 3, 2**31 + 5),  # one run of a channel is longer than 2^31
        (70_000, 2**20, 17),
        (2**31 + 11, 2, 16),
        (1, 2, 2**33 + 1),
    ],
)
def test_walking_rows(walk, L, C, S):
    elements, last, met, empty = walk(L, C, S)
    assert elements == L * S
    assert last == L * C * S - 1  # of the last channel
    assert met == 2 * L * S  # of the first channel and the last
    assert not empty


@pytest.mark.parametrize(
    ("L", "C", "S"), [(2**31 + 3, 2, 1), (3_000_000, 4099, 1), (100_000, 2**17, 15), (5, 2**29, 1)]
)
def test_walking_columns(walk, L, C, S):
    elements, last, met, empty = walk(L, C, S)
    assert elements == L * S
    assert last == L * C * S - 1
    assert met == L * C * S
    assert not empty
