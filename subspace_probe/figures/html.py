"""The page: one HTML file that shows a report and holds its data. It loads nothing: plotly.js lies inside, once.

Whatever a prompt or a model wrote is escaped. As a second lock, the page's own policy (Content-Security-Policy) lets
the browser run only the two scripts written here, named by their hashes, and fetch nothing.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files

from plotly.offline import get_plotlyjs

from subspace_probe.core.reports import Report
from subspace_probe.figures import sections, verdicts
from subspace_probe.figures.drawing import Drawing

UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def page(report: Report, drawings: Mapping[str, Drawing]) -> str:
    """The whole page.

    Args:
        report: what to show.
        drawings: the figures to draw of it, by name.
    """
    plotly, script = get_plotlyjs(), _resource("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    title = f"{report.study} on {report.provenance.model}" if report.provenance.model else report.study
    specs = {name: _spec(drawing, report) for name, drawing in drawings.items()}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="subspace-probe">
<title>{html.escape(title)}</title>
<style>{_resource("page.css")}</style>
</head>
<body>
<main>
{_header(report)}
{verdicts.lines(report)}
{sections.answer(report)}
{verdicts.unmet(report)}
{sections.runs(report)}
<section id="findings"><h2>Findings</h2>{verdicts.findings(report)}</section>
{sections.questions(report)}
{_figures(report, drawings)}
{sections.completions(report)}
{sections.cost(report)}
{sections.provenance(report)}
</main>
<script type="application/json" id="report">{report.to_json().translate(UNSAFE)}</script>
<script type="application/json" id="figures">{json.dumps(specs, allow_nan=False).translate(UNSAFE)}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _header(report: Report) -> str:
    source = report.provenance
    facts = [f"model <b>{html.escape(source.model)}</b>"] if source.model else []
    facts += [f"data {html.escape(source.data)}"] if source.data else []
    facts += [html.escape(source.created[:10])] if source.created else []
    return (
        f'<header><p class="kind">subspace-probe report</p><h1>{html.escape(report.study)}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p><ul class="counts">{verdicts.counts(report)}</ul></header>'
    )


def _figures(report: Report, drawings: Mapping[str, Drawing]) -> str:
    if not drawings:
        return ""
    cards = "".join(
        f'<figure id="figure-{html.escape(name)}"><h3>{html.escape(drawing.title)}</h3>'
        f"<p class='reading'>{html.escape(drawing.reading)}</p>"
        f'<div class="wide"><div class="plot" data-figure="{html.escape(name)}" role="img" '
        f'aria-label="{html.escape(drawing.title)}"></div></div>{verdicts.readings(report, drawing.findings)}'
        f"{_beside(report, drawing)}{_caption(report, drawing)}</figure>"
        for name, drawing in drawings.items()
    )
    warning = "<noscript><p>Figures need JavaScript; every number in them is in the data of this page.</p></noscript>"
    return f'<section id="figures-shown"><h2>Figures</h2>{warning}{cards}</section>'


def _beside(report: Report, drawing: Drawing) -> str:
    return "".join(f'<p class="beside">{html.escape(text)}</p>' for text in drawing.beside(report))


def _caption(report: Report, drawing: Drawing) -> str:
    about = " ".join(report.tables[name].about for name in drawing.needs if report.tables[name].about)
    return f"<figcaption>{html.escape(about)}</figcaption>" if about else ""


def _spec(drawing: Drawing, report: Report) -> dict[str, object]:
    """The figure as plain JSON, without its title, which the page sets as a heading."""
    figure = drawing(report)
    above = 84 if figure.layout.margin.t is None else figure.layout.margin.t  # pyright: ignore[reportAttributeAccessIssue]
    height = figure.layout.height or 450  # pyright: ignore[reportAttributeAccessIssue]
    figure.update_layout(title=None, margin_t=above - 40, height=height - 40)
    return json.loads(figure.to_json() or "{}")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return files("subspace_probe.figures").joinpath(name).read_text(encoding="utf-8")
