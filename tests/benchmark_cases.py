"""What the tests of the benchmark have in common."""

FEW = ["control", "none", "textbook", "portable", "file", "builtin-folded", "folded"]
