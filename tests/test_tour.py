"""docs/tour.ipynb runs, and shows a figure after each step."""

import pytest

from tests.commands import ROOT


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/tour.ipynb", 4)
    committed = [[output.output_type for output in cell.outputs] for cell in code_cells(notebook)]
    assert sum("display_data" in kinds for kinds in committed) == 6
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    assert [[output.output_type for output in cell.outputs] for cell in code_cells(notebook)] == committed
