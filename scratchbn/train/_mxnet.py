"""Import MXNet without its side effect in a job: a scheduler or server would serve, not return."""

from __future__ import annotations

import os

_role = os.environ.pop("DMLC_ROLE", None)
try:
    import mxnet  # noqa: F401
finally:
    if _role is not None:
        os.environ["DMLC_ROLE"] = _role
