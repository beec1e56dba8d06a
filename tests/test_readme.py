"""The README says what is there: its tables come from the registries, its code runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_tables_of_methods_are_those_of_the_registries() -> None:
    from subspace_probe.cli.methods import methods

    found = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", README.read_text(), re.DOTALL)
    assert found is not None
    wanted = methods()
    assert found[1].strip() == wanted, f"put this between the markers of README.md:\n\n{wanted}"


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(import subspace_probe as sp.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], str(README), "exec"), {"__name__": "readme"})
    assert "control.random" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 1e6
