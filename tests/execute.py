"""Execute lessons in place, and store them the way `test_notebooks.py` wants them.

    python tests/execute.py notebooks/05_caching.ipynb …

The outputs become what nbval compares with from then on, so look at them. Of the metadata only the
kernel's name and the tags are kept: no times, versions or marks of an editor.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=180,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,  # as JupyterLab does
        skip_cells_with_tag="nbval-skip",
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument)
        execute(Path(argument))
