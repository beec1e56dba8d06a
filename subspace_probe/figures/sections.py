"""The parts of the page that are text: the answer, what was asked, completions side by side, where it came from."""

import html
import json
from collections.abc import Iterable
from typing import Any

from subspace_probe.core.reports import Report
from subspace_probe.figures.rows import distinct, select
from subspace_probe.figures.verdicts import audited, badge

SHORT = 4
"""Sentences that are one paragraph."""


def answer(report: Report) -> str:
    """The answer in a paragraph, or in lines where it is long, from the table `summary`; nothing without it."""
    sentences = [html.escape(str(row["sentence"])) for row in _rows(report, "summary", "sentence")]
    between = "<br>" if len(sentences) > SHORT else " "
    return f'<p class="answer">{between.join(sentences)}</p>' if sentences else ""


def runs(report: Report) -> str:
    """The runs behind a report over seeds, each with a link to its own page, from the table `runs`."""
    rows = _rows(report, "runs", "case", "seed", "model", "unmet", "page")
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row"><a href="{html.escape(str(row["page"]))}">{html.escape(str(row["case"]) or "run")}, '
        f"seed {html.escape(str(row['seed']))}</a></th><td>{html.escape(str(row['model']))}</td>"
        f"<td>{html.escape(str(row['unmet']))}</td></tr>"
        for row in rows
    )
    return _section("runs", "Runs", _table(("run", "model", "expectations not met"), body), report.tables["runs"].about)


def questions(report: Report) -> str:
    """What each check asked and what came out, from the table `questions`; nothing without it."""
    rows = _rows(report, "questions", "check", "question", "answer", "verdict")
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{html.escape(str(row["check"]))}</code></th>'
        f"<td>{html.escape(str(row['question']))}</td>"
        f"<td>{html.escape(str(row['answer']))}</td><td>{badge(str(row['verdict']))}</td></tr>"
        for row in rows
    )
    title, table = "What was checked", _table(("check", "question", "answer", "verdict"), body)
    if audited(report):  # its findings say the same, with their numbers
        return f'<section id="questions"><details><summary><h2>{title}</h2></summary>{table}</details></section>'
    return _section("questions", title, table)


def completions(report: Report) -> str:
    """What the model wrote under each condition, a prompt a row; nothing without the table `completions`."""
    rows = _rows(report, "completions", "prompt", "condition", "text")
    if not rows:
        return ""
    conditions = distinct(str(row["condition"]) for row in rows)
    body = ""
    for prompt in distinct(row["prompt"] for row in rows):
        texts = [[row["text"] for row in select(rows, prompt=prompt) if str(row["condition"]) == c] for c in conditions]
        cells = "".join(f"<td>{''.join(map(_said, text))}</td>" for text in texts)
        body += f'<tr><th scope="row">{_said(prompt)}</th>{cells}</tr>'
    table = _table(("prompt", *conditions), body, "completions")
    return _section("completions", "What the model writes", table, report.tables["completions"].about)


def cost(report: Report) -> str:
    """What each check cost, folded away, from the table `cost`; nothing without it."""
    rows = _rows(report, "cost")
    if not rows:
        return ""
    head = tuple(rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(value))}</td>' for value in row.values())}</tr>" for row in rows
    )
    about = f'<p class="reading">{html.escape(report.tables["cost"].about)}</p>'
    return (
        '<section id="cost"><details><summary><h2>What it cost, and what was left out</h2></summary>'
        f"{about}{_table(head, body)}</details></section>"
    )


def provenance(report: Report) -> str:
    """Everything needed to run it again."""
    source = report.provenance
    config = {k: f"{_plain(v)}{'  (given)' if k in source.given else ''}" for k, v in source.config.items()}
    facts = {
        "model": source.model,
        "fingerprint": source.fingerprint,
        "data": source.data,
        "seed": source.seed,
        "computed in": f"{source.seconds:.1f} seconds",
        "created": source.created,
    }
    lists = "".join(
        f"<div><h3>{name}</h3><dl>{_pairs(values.items())}</dl></div>"
        for name, values in (("source", facts), ("settings", config), ("versions", source.versions))
        if values
    )
    return (
        '<section id="provenance"><details><summary><h2>Where this comes from</h2></summary>'
        f'<div class="columns">{lists}</div>'
        "<p>The report as data is inside this page: "
        '<code>JSON.parse(document.getElementById("report").textContent)</code>.</p></details></section>'
    )


def _rows(report: Report, name: str, *columns: str) -> list[dict[str, Any]]:
    """The rows of a table that has these columns; none where there is no such table."""
    table = report.tables.get(name)
    if table is None or not table.rows:
        return []
    for column in columns:
        table.column(column)  # raises, with the nearest match, where it is missing
    return table.records()


def _pairs(items: Iterable[tuple[str, object]]) -> str:
    return "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in items
        if value not in ("", None)
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _said(text: object) -> str:
    """Text of a prompt or a model: as written, whatever it holds and in whichever direction it runs."""
    return f'<div class="said" dir="auto">{html.escape(str(text)) or "<i>nothing</i>"}</div>'


def _table(head: Iterable[str], body: str, kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(name: str, title: str, body: str, about: str = "") -> str:
    lead = f'<p class="reading">{html.escape(about)}</p>' if about else ""
    return f'<section id="{name}"><h2>{title}</h2>{lead}{body}</section>'
