"""What the norm layers of a net do while it trains: a file, a live table in the terminal, plots."""

from .measure import SATURATION
from .monitor import Monitor
from .records import FIELDS

__all__ = ["FIELDS", "SATURATION", "Monitor"]
