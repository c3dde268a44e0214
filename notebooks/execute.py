"""Executes notebooks in place, and keeps of them what does not depend on the machine."""

import argparse
import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
# Nothing without its kernel, and under another number in each run.
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: nbformat.NotebookNode) -> None:
    """Fills in the outputs, run by this very interpreter in the folder of the notebooks.

    Raises ``nbclient.exceptions.CellExecutionError``, with the cell and its traceback, if a cell fails.
    """
    # Without folders to search, "python3" is the interpreter that asks, whatever kernels a user has installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=300,  # seconds for one cell: one that never answers is an error
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    with tempfile.TemporaryDirectory() as folder:  # no start-up files, no history of the user's own IPython
        kernel.connection_file = str(Path(folder) / "kernel.json")
        client.execute(env=os.environ | {"IPYTHONDIR": folder})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [small(output) for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A picture in 256 colours, which is enough for a plot and a third of the bytes; anything else as it is."""
    if picture := output.get("data", {}).get("image/png"):
        file = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize().save(file, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


def main(arguments: argparse.Namespace) -> None:
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        written = (arguments.to or path.parent) / path.name
        nbformat.write(notebook, written)
        print(f"{path.name}: {written.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all in this folder, if none is named")
    parser.add_argument("--to", type=Path, help="another folder to write to")
    main(parser.parse_args())
