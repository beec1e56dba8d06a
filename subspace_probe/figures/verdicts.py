"""The findings as HTML: each number with its interval, its null, a picture of the three, and a verdict."""

import html
import math
from collections.abc import Iterable, Sequence

from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.reports import Report, number, span
from subspace_probe.figures.theme import FAINT, GRID, INK, NULL, VERDICTS

Number = float | int
LINES: dict[str, tuple[str, dict[str, str]]] = {
    "control": (
        "Does the intervention control the behaviour, specifically and reliably?",
        {
            "supported": "Yes, as far as was tested.",
            "refuted": "No: it does not, or not it alone.",
            "inconclusive": "Open: what was run does not decide it.",
            "not tested": "This was not tested.",
        },
    ),
    "mechanism": (
        "Is the subspace what the model itself uses?",
        {
            "supported": "Yes, as far as was tested.",
            "refuted": "No: whatever it does, the model does not do it this way.",
            "inconclusive": "Open: what was run does not decide it.",
            "not tested": "This was not tested.",
        },
    ),
}
"""The two lines of an audit: what each asks, and what each verdict means in plain words."""
WIDTH, HEIGHT, EDGE = 124, 22, 6
HEAD = ("finding", "estimate", "95 % interval", "null", "n", "", "verdict", "expected")


def badge(verdict: str) -> str:
    """A verdict as a coloured badge; a word that is no verdict stays a plain one."""
    sign, colour = next((v for name, v in VERDICTS.items() if name == verdict), ("", FAINT))
    look = "hollow" if verdict in ("unaudited", "not tested") else "filled"
    return f'<span class="badge {look}" style="--colour:{colour}">{sign} {html.escape(verdict)}</span>'


def counts(report: Report) -> str:
    """How many findings have each verdict."""
    verdicts = [finding.verdict for finding in report.findings]
    present = [verdict for verdict in VERDICTS if verdict in verdicts]
    return "".join(f"<li>{badge(verdict)} <b>{verdicts.count(verdict)}</b></li>" for verdict in present)


def lines(report: Report) -> str:
    """The verdicts of an audit side by side, never one score; those that were asked for."""
    found = {finding.name: finding for finding in report.findings if finding.name in LINES}
    if not found:
        return ""
    cards = "".join(
        f'<div class="line"><h2>{name.capitalize()} {badge(found[name].verdict)}</h2><p>{question}</p>'
        f'<p class="plain">{said.get(found[name].verdict, found[name].verdict)}</p>{_why(found[name])}</div>'
        for name, (question, said) in LINES.items()
        if name in found
    )
    key = "Either can hold without the other: one may steer by a direction that the model never uses."
    return f'<section class="lines" id="verdicts">{cards}</section><p class="key">{key}</p>'


def _why(finding: Finding) -> str:
    return f'<p class="note">{html.escape(finding.note)}</p>' if finding.note else ""


def readings(report: Report, names: Iterable[str]) -> str:
    """What these findings say, each with its verdict; nothing for those the report does not have."""
    found = {finding.name: finding for finding in report.findings}
    said = "".join(
        f"<li>{badge(found[name].verdict)} {html.escape(found[name].note or found[name].claim)}</li>"
        for name in names
        if name in found
    )
    return f'<ul class="readings">{said}</ul>' if said else ""


def unmet(report: Report) -> str:
    """The findings that are not where the study expects them, where nobody can overlook them."""
    failures = report.failures()
    if not failures:
        expected = sum(finding.expected is not None for finding in report.findings)
        met = "The one stated expectation is met." if expected == 1 else f"All {expected} stated expectations are met."
        return f'<p class="met">✓ {met}</p>' if expected else ""
    items = "".join(
        f"<li><code>{html.escape(f.name)}</code> is <b>{number(f.estimate)}</b>, "
        f"expected {_wanted(f)}. {html.escape(f.claim)}{_note(f)}</li>"
        for f in failures
    )
    several = f"{len(failures)} expectations are" if len(failures) > 1 else "One expectation is"
    return f'<section class="unmet" id="unmet" role="alert"><h2>{several} not met</h2><ul>{items}</ul></section>'


def findings(report: Report) -> str:
    """The table of all findings; of an audit, the many checks that did not apply are a folded list below it."""
    if not report.findings:
        return "<p>This report has no findings.</p>"
    left = [f for f in report.findings if f.verdict == "not tested" and f.name not in LINES] if audited(report) else []
    head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
    body = "".join(_row(finding) for finding in report.findings if finding not in left)
    return (
        f'<div class="wide"><table class="findings"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="key">{picture_key()}</p>{_untested(left)}'
    )


def audited(report: Report) -> bool:
    """Whether a report has the verdicts of an audit."""
    return any(finding.name in LINES for finding in report.findings)


def _untested(left: Sequence[Finding]) -> str:
    if not left:
        return ""
    said = "".join(f"<li><code>{html.escape(f.name)}</code> {html.escape(f.note)}</li>" for f in left)
    return f"<details><summary>Not tested: {len(left)} checks, and why</summary><ul>{said}</ul></details>"


def picture_key() -> str:
    """What the small pictures in the table mean."""
    return (
        "In the pictures: the dot is the estimate and the line its interval; the grey band is what the control gives; "
        "shaded in red is where the study does not expect the estimate. Thin strokes stand at −1, 0 and 1."  # noqa: RUF001
    )


def _row(finding: Finding) -> str:
    expected, mark = "", ""
    if finding.expected is not None:
        word = "met" if finding.met else "not met"
        expected = f"{_wanted(finding)}<br><span class='{word.replace(' ', '-')}'>{word}</span>"
        mark = "" if finding.met else ' class="failed"'
    cells = [
        f'<th scope="row"><code>{html.escape(finding.name)}</code><br>'
        f"{html.escape(finding.claim)}{_note(finding)}</th>",
        f'<td class="number"><b>{number(finding.estimate)}</b></td>',
        f'<td class="number"{_of(finding.interval)}>{span(finding.interval)}{_level(finding.interval)}</td>',
        f'<td class="number"{_of(finding.null)}>{span(finding.null)}{_level(finding.null)}</td>',
        f'<td class="number">{finding.n or ""}</td>',
        f"<td>{picture(finding)}</td>",
        f"<td>{badge(finding.verdict)}</td>",
        f"<td>{expected}</td>",
    ]
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _note(finding: Finding) -> str:
    return f'<br><span class="note">{html.escape(finding.note)}</span>' if finding.note else ""


def _level(interval: Interval | None) -> str:
    """What the interval holds, where that is not the 95 % of the column's head."""
    return "" if interval is None or interval.level == 0.95 else f"<br>holds {interval.level:.0%}"


def _wanted(finding: Finding) -> str:
    return html.escape(str(finding.expected).replace(">=", "≥").replace("<=", "≤"))


def _of(interval: Interval | None) -> str:
    return f' title="{interval.level:.0%} of: {html.escape(interval.of)}"' if interval and interval.of else ""


def picture(finding: Finding) -> str:
    """Estimate, interval and null on one line, for numbers within [-1, 1]; nothing for others."""
    spans = [i for i in (finding.interval, finding.null) if i and math.isfinite(i.low) and math.isfinite(i.high)]
    values = [finding.estimate, *(end for interval in spans for end in (interval.low, interval.high))]
    if not math.isfinite(finding.estimate) or max(map(abs, values)) > 1:
        return ""
    least = -1.0 if min(values) < 0 else 0.0

    def x(value: Number) -> str:
        return f"{EDGE + (WIDTH - 2 * EDGE) * (value - least) / (1 - least):.1f}"

    def bar(low: Number, high: Number, y: Number, height: Number, style: str) -> str:
        width = max(float(x(high)) - float(x(low)), 1.5)
        return f'<rect x="{x(low)}" y="{y}" width="{width:.1f}" height="{height}" {style}/>'

    middle = HEIGHT / 2
    parts = [bar(least, 1, middle - 0.5, 1, f'fill="{GRID}"')]
    parts += [bar(tick, tick, 3, HEIGHT - 6, f'fill="{GRID}"') for tick in (-1, 0, 1) if tick >= least]
    if finding.expected is not None and finding.expected.above is not None:
        parts.append(bar(least, max(least, min(1, finding.expected.above)), 3, HEIGHT - 6, 'class="unwanted"'))
    if finding.expected is not None and finding.expected.below is not None:
        parts.append(bar(max(least, min(1, finding.expected.below)), 1, 3, HEIGHT - 6, 'class="unwanted"'))
    if finding.null in spans and finding.null:
        parts.append(bar(finding.null.low, finding.null.high, middle - 5, 10, f'fill="{NULL}" opacity="0.5"'))
    if finding.interval in spans and finding.interval:
        parts.append(bar(finding.interval.low, finding.interval.high, middle - 1.25, 2.5, f'fill="{INK}"'))
    parts.append(f'<circle cx="{x(finding.estimate)}" cy="{middle}" r="4" fill="{VERDICTS[finding.verdict][1]}"/>')
    label = f"{number(finding.estimate)}, interval {span(finding.interval)}, null {span(finding.null)}"
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
