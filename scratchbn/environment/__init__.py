"""Does this machine work: what mxnet needs before it is imported, devices, and the doctor.

``prepare`` runs with ``import scratchbn``; ``help`` explains a failed ``import mxnet``; ``driver``
and ``device`` find a GPU that works; ``probe`` tries mxnet in a process of its own; ``doctor`` asks
them all, and is imported by the command line only.
"""
