"""The notebooks, run from top to bottom: the tests run them, and what they show is kept in the repository by

    python -m tests.studies.notebooks [name ...]

which needs kaleido and a Chrome (BROWSER_PATH) to store every figure as a picture beside its data, so that a notebook
can be read where nothing runs.
"""

import base64
import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 900


@dataclass(frozen=True)
class Executed:
    """A notebook with what its cells gave, and the folder that it ran in."""

    notebook: Any
    folder: Path
    name: str

    @property
    def report(self) -> "Report":
        """What the study found, as its last cell saved it."""
        from subspace_probe.core.reports import Report

        return Report.load(self.folder / f"{self.name}.json")

    @property
    def shown(self) -> list[Any]:
        """All outputs of all cells."""
        return [output for cell in self.notebook.cells for output in cell.get("outputs", [])]

    def check(self) -> None:
        """What every notebook shows: tables and figures, no error, no warning, no progress bars, and no functions."""
        kinds = {kind for output in self.shown for kind in output.get("data", {})}
        assert PLOTLY in kinds, "no figure"
        assert any("<table>" in output["data"].get("text/html", "") for output in self.shown if "data" in output)
        assert not [output for output in self.shown if output.output_type == "error"]
        assert not [output for output in self.shown if output.get("name") == "stderr"], "warnings or progress bars"
        code = [cell.source for cell in self.notebook.cells if cell.cell_type == "code"]
        assert not any(line.startswith(("def ", "class ")) for source in code for line in source.splitlines())


def execute(name: str, folder: Path) -> Executed:
    """Run a notebook in a folder, as a reader would.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # the others put megabytes of plotly.js into the first output
    os.environ["TQDM_DISABLE"] = "1"
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Jupyter machinery, which runs in this process and is not ours
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return Executed(notebook, folder, name)


def keep(name: str) -> Path:
    """Run a notebook and write it back with what it showed, each figure as a picture too."""
    import nbformat
    import plotly.graph_objects as go

    with tempfile.TemporaryDirectory() as folder:
        done = execute(name, Path(folder))
        done.check()
    for output in done.shown:
        figure = output.get("data", {}).get(PLOTLY)
        if figure is not None:
            drawn = go.Figure(figure)
            picture = drawn.to_image(format="png", width=WIDTH, height=drawn.layout.height or 450)
            output["data"]["image/png"] = base64.b64encode(picture).decode()
    for number, cell in enumerate(done.notebook.cells):
        cell["id"] = f"cell-{number}"  # random ids would make every run a change
        cell["metadata"] = {}
        if cell.cell_type == "code":
            cell["execution_count"] = None
    done.notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    path = FOLDER / f"{name}.ipynb"
    nbformat.validate(done.notebook)
    path.write_text(json.dumps(done.notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    for each in sys.argv[1:] or NAMES:
        written = keep(each)
        print(f"{written.name}: {written.stat().st_size / 1000:.0f} kB")
