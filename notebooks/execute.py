"""Run notebooks/demo.ipynb from the project's folder and keep its outputs: `make notebook`, after `make demo`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

path = Path(__file__).with_name("demo.ipynb")
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent.parent}}).execute()
for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # when it ran
    if cell.cell_type == "code":  # progress bars and warnings of libraries
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
nbformat.write(notebook, path)
