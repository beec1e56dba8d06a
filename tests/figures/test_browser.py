"""The page in a real browser: every figure renders, the console is silent, hostile text does not run."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    "--headless --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync "
    "--virtual-time-budget=8000 --enable-logging=stderr --window-size=1200,1600 --dump-dom"
)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path: the page is checked as text only")


def visit(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts have run, and what the console said."""
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [CHROMIUM, *FLAGS.split(), *sandbox, f"--user-data-dir={profile}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def unrendered(document: str) -> list[str]:
    """Names of the figures in which nothing is drawn."""
    body = re.sub(r"<script\b.*?</script>", "", document, flags=re.DOTALL)
    parts = re.split(r'<figure id="figure-([\w-]+)"', body)
    figures = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert figures, "no figures in the page: the check would hold of nothing"
    # An svg alone is not enough: plotly draws empty axes where it is given nothing. "hm" is a heat map.
    drawn = re.compile(r'class="main-svg".*class="(trace |hm")', re.DOTALL)
    return [name for name, part in figures.items() if not drawn.search(part)]


@pytest.fixture
def written(report: "Report", tmp_path: Path) -> Path:
    from subspace_probe.figures import save_html

    return save_html(report, tmp_path / "report.html")


@needs_browser
@pytest.mark.slow
def test_every_figure_renders_in_silence(written: Path, tmp_path: Path) -> None:
    document, console = visit(written, tmp_path / "profile")
    assert unrendered(document) == []
    assert console == []
    assert document.count('class="main-svg"') >= 8
    assert "could not be drawn" not in re.sub(r"<script\b.*?</script>", "", document, flags=re.DOTALL)


@needs_browser
@pytest.mark.slow
def test_the_check_above_can_fail(written: Path, tmp_path: Path) -> None:
    """A figure of nothing, a figure that fails, and a script that the page's policy does not know."""
    text = written.read_text(encoding="utf-8")
    start = text.index('id="figures">') + len('id="figures">')
    specs = text[start:].replace('"guard": {"data": [', '"guard": {"data": [], "was": [', 1)
    broken = text[:start] + specs.replace('"tokens": {"data": [', '"was tokens": {"data": [', 1)
    broken = broken.replace("</main>", "<script>document.title = 'hacked'</script></main>", 1)
    page = written.with_name("broken.html")
    page.write_text(broken, encoding="utf-8")
    document, console = visit(page, tmp_path / "profile")
    assert unrendered(document) == ["guard", "tokens"]  # and the other figures are drawn all the same
    assert any("figure tokens" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
    assert "<title>hacked" not in document
