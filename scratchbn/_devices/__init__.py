"""How devices of one process share the statistics of a batch.

MXNet's threads run the devices side by side, and Python starts them one after the other. So each
brings what it measured to a round (``rounds.py``) and waits there for the others, or for an error
that says who is missing (``failure.py``); then each merges what all have brought (``moments.py``).
To MXNet that is an operator (``operator.py``).
"""

from __future__ import annotations

from .operator import Exchanged, exchange, training
from .rounds import TIMEOUT, Seat, check_timeout, default_timeout, rounds

__all__ = [
    "TIMEOUT",
    "Exchanged",
    "Seat",
    "check_timeout",
    "default_timeout",
    "exchange",
    "rounds",
    "training",
]
