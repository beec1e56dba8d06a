"""Every notebook runs from top to bottom on the bundled organism, and is kept without its outputs."""

from pathlib import Path

import pytest

FULL, SMALL = '**study.presets["tiny"])', '**study.presets["tiny"], n_test=384, draws=40)'
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Jupyter machinery, which runs in this process and is not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_tables_and_figures(path: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), f"{path.name}: clear its outputs before committing"
    for cell in notebook.cells:
        cell.source = cell.source.replace(FULL, SMALL)  # a quarter of the work
    assert any(SMALL in cell.source for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds  # figures are plotly objects
    assert any("<table>" in output["data"].get("text/html", "") for output in shown if "data" in output)
    assert not [output for output in shown if output.output_type == "error"]
