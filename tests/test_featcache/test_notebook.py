"""Progress in a notebook, run by a real kernel."""

from pathlib import Path

import pytest

CELL = """
import featcache
store = featcache.encode("digits", "val", root={root!r}, progress=True)
print(store)
"""


def test_progress_is_shown_in_a_notebook(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(CELL.format(root=str(tmp_path)))]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    said = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "297/297" in said
    assert "ImageStore(digits/val: 297 x 128" in said
