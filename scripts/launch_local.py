"""Run a command as a job on this machine; the same as ``python -m scratchbn launch``."""

from __future__ import annotations

import sys

from scratchbn.launch import main

if __name__ == "__main__":
    sys.exit(main())
