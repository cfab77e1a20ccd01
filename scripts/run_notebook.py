"""Run the notebook of docs/learn from top to bottom and save it with its outputs.

Exit status: 0; 1 if a cell fails, and the file stays as it was; 2 if it is no notebook.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scratchbn._command import Parser, fail
from scratchbn._writing import write_text

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / "docs" / "learn" / "batch-norm-from-scratch.ipynb"
SECONDS = 600  # for a cell; a kernel that hangs is ended

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class _ThisPython(KernelSpecManager):
    """Knows one kernel, that of the interpreter that runs this, whatever else is installed."""

    def get_kernel_spec(self, kernel_name: str) -> Any:
        """Return it under any name."""
        return KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3", language="python")


def executed(notebook: Any, after_cell: Callable[..., None] | None = None) -> Any:
    """Run all cells in a fresh kernel, in a temporary directory; return the notebook with outputs.

    Parameters
    ----------
    notebook : NotebookNode
        As nbformat reads it; stays as it is.
    after_cell : callable, optional
        Called after each cell, with keywords.

    Returns
    -------
    NotebookNode
        The same cells with fresh outputs, and nothing of the machine in the metadata.

    Raises
    ------
    CellExecutionError
        If a cell raises; its text has the cell and the traceback.
    CellTimeoutError, DeadKernelError
        If a cell takes longer than SECONDS, or the kernel dies.
    """
    result = nbformat.from_dict(notebook)
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            result,
            km=AsyncKernelManager(
                kernel_spec_manager=_ThisPython(),
                connection_file=f"{folder}/kernel.json",
                transport="ipc",  # sockets in this directory, no network
                ip=f"{folder}/kernel",
            ),
            timeout=SECONDS,
            record_timing=False,
            coalesce_streams=True,
            on_cell_complete=after_cell,
        )
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "IPYTHONDIR": f"{folder}/ipython",
            "TMPDIR": folder,  # what the cells leave behind goes with it
            "OMP_NUM_THREADS": "1",  # so that sums are the same on any number of cores
        }
        client.execute(cwd=folder, env={**os.environ, **own})
    result.metadata = nbformat.from_dict(_METADATA)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script on the arguments of the command line and return its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=NOTEBOOK, help="another notebook")
    file = parser.parse_args(argv).file
    began = time.monotonic()
    try:
        notebook = nbformat.read(file, as_version=4)
        with tqdm(total=len(notebook.cells), unit="cell", disable=None) as bar:
            result = executed(notebook, lambda **_: bar.update())
        write_text(file, nbformat.writes(result) + "\n")
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:  # with the cell
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, nbformat.ValidationError) as error:
        return fail("run_notebook.py", 2, str(error))
    size = file.stat().st_size / 1e6
    print(f"{file.name}: {time.monotonic() - began:.0f} s, {size:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
