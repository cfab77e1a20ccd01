"""The kernel on NVIDIA GPUs: compiled for the card that is there when it is first used.

``batch_norm.cu`` is the arithmetic, ``walk.h`` the ways through an array, ``sums.h`` what blocks
add up together, ``call.h`` what a kernel is given; ``launch.h`` and ``driver.h`` are the host's
part, which ``operator.cc`` includes.
``_compile.py`` makes code for a card with NVRTC, NVIDIA's compiler as a library; ``_load.py`` hands
it to the operator.
"""

from __future__ import annotations

from ._load import available, build, facts, load

__all__ = ["available", "build", "facts", "load"]
