"""The GPU path run without a GPU: see docs/gpu.md.

``standins`` builds CUDA libraries whose device memory is memory of the host and whose kernels
compute nothing; ``house`` is the virtual environment; ``journal`` reads what the libraries noted
down, ``ptx`` what NVRTC compiled. ``suite`` runs tests and sorts what failed, with ``recorder``
inside pytest; ``checks`` holds the questions that a journal answers, ``scenes`` what is run for
them.
"""
