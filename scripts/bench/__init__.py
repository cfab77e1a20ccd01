"""The rooms of ``scripts/benchmark.py``."""

try:
    import cpuinfo  # noqa: F401
    import matplotlib  # noqa: F401
    import psutil  # noqa: F401
    import scipy  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}: pip install 'scratchbn[cpu,gluoncv,demo]' has all") from error
