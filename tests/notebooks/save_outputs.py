"""Run notebooks and save what they print, as the tests compare it: ``save_outputs.py [PATH...]``.

Without a path, all of them. Nothing that differs from run to run is saved: no widget state, no
widget's id (its text stands for it), no times.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def save_outputs(path: Path) -> None:
    """Run one notebook beside its recordings, and write it where it was."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": path.parent}},
    )
    client.store_widget_state = False
    client.execute()
    kernel = notebook.metadata.kernelspec
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb")):
        save_outputs(Path(name).resolve())
