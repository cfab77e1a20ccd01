"""Example networks that take any normalization layer; part of the repository, not installed."""
