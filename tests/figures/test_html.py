"""The page is whole, loads nothing, escapes everything and holds its data."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report

pytestmark = pytest.mark.slow

Only = Callable[..., "Report"]
LOADS = {"src", "href", "srcset", "data", "action", "formaction", "poster", "background", "ping", "xlink:href"}
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text of each script, the visible text."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[tuple[dict[str, str | None], str]] = field(default_factory=list)
    visible: str = ""
    unbalanced: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif self._open[-1:] != ["style"]:
            self.visible += data

    def script(self, name: str) -> str:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return text


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def loaded(page: Page) -> list[str]:
    """Whatever an element of the page would fetch."""
    urls = [str(v) for _, attributes in page.elements for name, v in attributes.items() if name in LOADS]
    return [url for url in urls if not url.startswith("#")]


@pytest.fixture(scope="module")
def page(report: "Report", tmp_path_factory: pytest.TempPathFactory) -> Page:
    from subspace_probe.figures import save_html

    return read(save_html(report, tmp_path_factory.mktemp("page") / "report.html"))


def test_loads_nothing(page: Page) -> None:
    assert loaded(page) == []
    assert not [tag for tag, _ in page.elements if tag in {"link", "iframe", "object", "embed", "base", "img"}]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_check_above_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<script src="https://cdn.example/plotly.js"></script>', encoding="utf-8")
    assert loaded(read(bad)) == ["https://cdn.example/plotly.js"]


def test_is_well_formed_and_holds_plotly_once(page: Page) -> None:
    assert page.unbalanced == []
    assert page._open == []
    assert sum("plotly.js v" in text[:200] for _, text in page.scripts) == 1
    assert [attributes.get("id") for attributes, _ in page.scripts] == ["report", "figures", None, None]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_policy_allows_its_two_scripts_and_no_other(page: Page) -> None:
    (policy,) = [str(a["content"]) for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    (allowed,) = [part for part in policy.split("; ") if part.startswith("script-src")]
    runnable = [text for attributes, text in page.scripts if attributes.get("type") is None]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in runnable]
    assert allowed.split()[1:] == [f"'sha256-{digest}'" for digest in digests]
    assert "http" not in policy


def test_hostile_text_is_text(page: Page, report: "Report") -> None:
    prompts = set(report.tables["completions"].column("prompt"))
    assert any("<script>" in prompt for prompt in prompts)
    assert [prompt for prompt in prompts if prompt not in page.visible] == []
    assert "A number <b>outside</b> the unit interval & without a null." in page.visible
    assert len(page.scripts) == 4


def test_the_data_reads_back_as_the_report(page: Page, report: "Report") -> None:
    from subspace_probe.core.reports import Report

    assert Report.from_json(page.script("report")).to_json() == report.to_json()
    assert "</" not in page.script("report") + page.script("figures")


def test_every_figure_has_its_place_and_a_reading(page: Page, report: "Report") -> None:
    from subspace_probe.figures import FIGURES, draw

    places = [attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes]
    assert places == list(draw(report)) == list(json.loads(page.script("figures")))
    for name in places:
        assert FIGURES.load(str(name)).reading in page.visible


def test_unmet_expectations_come_before_the_findings(page: Page) -> None:
    assert "2 expectations are not met" in page.visible
    assert page.visible.index("not met") < page.visible.index("Findings")
    assert "refusal_rate.ablated is 0.310, expected ≤ 0.1." in page.visible
    assert sum(attributes.get("class") == "failed" for _, attributes in page.elements) == 2


def test_met_expectations_are_said_to_be_met(report: "Report", tmp_path: Path) -> None:
    from subspace_probe.figures import save_html

    met = replace(report, findings=tuple(finding for finding in report.findings if finding.met))
    visible = read(save_html(met, tmp_path / "met.html")).visible
    assert "All 3 stated expectations are met." in visible
    assert "Other skills change" not in visible  # the note of an unmet one


def test_findings_show_what_the_report_says(page: Page, report: "Report") -> None:
    for finding in report.findings:
        assert finding.name in page.visible
        assert finding.claim in page.visible
        assert finding.verdict in page.visible
    assert "[0.940, 1.000]" in page.visible
    assert "n/a" in page.visible


def test_settings_show_which_were_given(page: Page) -> None:
    assert "0  (given)" in page.visible
    assert "41.3 seconds" in page.visible
    assert "organism:chat/requests, 2,048 prompts" in page.visible


def test_a_bare_report_is_a_page(tmp_path: Path) -> None:
    from subspace_probe.core.reports import Report
    from subspace_probe.figures import save_html

    page = read(save_html(Report("empty"), tmp_path / "empty.html"))
    assert "This report has no findings." in page.visible
    assert page.unbalanced == []


def test_a_table_without_its_columns_is_named(only: Only, tmp_path: Path) -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import save_html

    with pytest.raises(UnknownName, match=r"Unknown column 'text'. Did you mean 'texts'"):
        save_html(only(completions=Table.of([{"prompt": "a", "condition": "b", "texts": "c"}])), tmp_path / "x.html")


def test_an_interval_of_another_level_says_so(report: "Report", tmp_path: Path) -> None:
    from subspace_probe.core.findings import Finding, Interval
    from subspace_probe.figures import save_html

    wide = replace(report, findings=(Finding("a", "b", 0.5, Interval(0.1, 0.9, 0.99), n=3),))
    assert "holds 99%" in read(save_html(wide, tmp_path / "wide.html")).visible


def test_half_a_surrogate_pair_is_no_obstacle(only: Only, tmp_path: Path) -> None:
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import save_html

    said = Table.of([{"prompt": "odd \ud83d token", "condition": "baseline", "text": "\u2028"}])
    assert "odd " in read(save_html(only(completions=said), tmp_path / "odd.html")).visible


def test_written_whole_or_not_at_all(report: "Report", tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError, UnknownName
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import save_html

    path = tmp_path / "report.html"
    path.write_text("the old one", encoding="utf-8")
    with pytest.raises(UnknownName):
        save_html(replace(report, tables={"guard": Table.of([{"framing": "plain"}])}), path)
    assert path.read_text(encoding="utf-8") == "the old one"
    with pytest.raises(StoreError, match="is a folder"):
        save_html(report, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_writes_the_same_page_each_time(report: "Report", tmp_path: Path) -> None:
    from subspace_probe.figures import save_html

    first, second = save_html(report, tmp_path / "a.html"), save_html(report, tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
