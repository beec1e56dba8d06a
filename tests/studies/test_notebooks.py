"""What the repository keeps of the notebooks. Each is run by the tests of its study."""

import json
from typing import Any

import pytest

from tests.studies.notebooks import FOLDER, NAMES, PLOTLY


@pytest.fixture(params=NAMES)
def cells(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{request.param}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_every_study_has_a_notebook_and_every_notebook_a_test() -> None:
    from subspace_probe.studies import STUDIES

    assert sorted(STUDIES) == NAMES
    for name in NAMES:
        source = (FOLDER.parent / "tests" / "studies" / f"test_{name}.py").read_text(encoding="utf-8")
        assert f'execute("{name}"' in source, f"test_{name}.py does not run its notebook"


def test_can_be_read_without_running(cells: list[dict[str, Any]]) -> None:
    """Figures are kept as pictures; all outputs together stay small."""
    figures = [o["data"] for c in cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})]
    assert figures
    assert all("image/png" in figure for figure in figures)
    assert len(json.dumps(cells)) < 900_000


def test_asks_one_question_and_reads_the_answer(cells: list[dict[str, Any]]) -> None:
    first, last = "".join(cells[0]["source"]), "".join([c for c in cells if c["cell_type"] == "code"][-1]["source"])
    assert cells[0]["cell_type"] == "markdown"
    assert first.startswith("# ")
    assert "?" in first.splitlines()[0]
    assert ".save(" in last
