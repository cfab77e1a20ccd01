"""``python -m scratchbn`` is the command ``scratchbn``."""

from __future__ import annotations

import sys

from scratchbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
