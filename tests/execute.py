"""Execute lessons in place, and store them the way `test_notebooks.py` wants them.

    python tests/execute.py notebooks/05_caching.ipynb …

The outputs become what nbval compares with from then on, so look at them. Of the metadata only the
kernel's name and the tags are kept: no times, versions or marks of an editor. *Going deeper* is
folded. The chart of a cell with a tag `readme-NAME` becomes `notebooks/pictures/NAME.png`.
"""

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDED = {"jp-MarkdownHeadingCollapsed": True}


def cell_metadata(cell) -> dict:
    """What is kept of a cell's metadata."""
    tags = cell.metadata.get("tags")
    folded = cell.cell_type == "markdown" and cell.source.startswith("## Going deeper")
    return ({"tags": tags} if tags else {}) | (FOLDED if folded else {})


def pictures(notebook) -> dict[str, bytes]:
    """The charts of the cells with a tag `readme-NAME`, as PNG, by the names of their files."""
    return {
        tag.replace("readme-", "") + ".png": base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for tag in cell.metadata.get("tags", [])
        if tag.startswith("readme-")
        for output in cell.outputs
        if "image/png" in output.get("data", {})
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
        cell.metadata = nbformat.from_dict(cell_metadata(cell))
    nbformat.write(notebook, path)
    for name, picture in pictures(notebook).items():
        path.with_name("pictures").mkdir(exist_ok=True)
        (path.with_name("pictures") / name).write_bytes(picture)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument)
        execute(Path(argument))
