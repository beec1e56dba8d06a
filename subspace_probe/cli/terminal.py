"""How things look in a terminal. What users, models and files wrote is shown as text, never as markup."""

import os
import re
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from subspace_probe.core.findings import Finding
    from subspace_probe.core.reports import Report

WIDE = 120
"""Width of what goes to a file or a pipe."""

STYLES = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not tested": "dim",
    "unaudited": "dim",
}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def console(*, stderr: bool = False) -> Console:
    """Where to print, as wide as the terminal."""
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = WIDE
    return found


def say(*parts: str | Text | tuple[str, str]) -> None:
    """One line, as long as it is."""
    console().print(Text.assemble(*parts), soft_wrap=True)


def warn(message: str) -> None:
    """A result that nobody should overlook."""
    console().print(Text.assemble(("! ", "bold yellow"), (message, "yellow")), soft_wrap=True)


@contextmanager
def warnings_shown() -> Generator[None]:
    """What the library warns of, once each, on a line of its own instead of Python's two."""
    with warnings.catch_warnings(record=True) as caught:
        # whatever a caller's filters are: a warning of numbers belongs beside the numbers
        warnings.simplefilter("default", UserWarning)
        yield
    for message in dict.fromkeys(plain(str(each.message)) for each in caught):
        warn(message)


def complain(message: str) -> None:
    """An error, on stderr."""
    console(stderr=True).print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)


def wrote(*paths: Path) -> None:
    """Where the files are."""
    for path in paths:
        say(("wrote ", "dim"), (str(path), "cyan"))


def plain(text: str) -> str:
    """A text on one line, without what could steer the terminal."""
    return _UNPRINTABLE.sub("\N{MIDDLE DOT}", " ".join(text.split()))


def grid(head: Sequence[Column | Text | str], rows: Iterable[Sequence[RenderableType]], title: str = "") -> None:
    """A table; strings in it are text, not markup."""
    columns = [Column(name) if isinstance(name, Text) else name for name in head]
    table = Table(
        *columns, box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False
    )
    for row in rows:
        if row:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        else:
            table.add_section()
    console().print(table)


def right(name: str) -> Column:
    """A column of numbers."""
    return Column(name, justify="right", no_wrap=True)


def verdict(name: str) -> Text:
    """A verdict in its colour."""
    return Text(name, style=STYLES.get(name, ""))


def mark(finding: "Finding") -> Text:
    """What was expected, and whether it is so."""
    if finding.expected is None:
        return Text("")
    yes, no = ("✓", "✗") if "utf" in (console().encoding or "").lower() else ("ok", "NO")
    style = "green" if finding.met else "bold red"
    return Text(f"{yes if finding.met else no} {finding.expected}", style=style)


def show_report(report: "Report") -> None:
    """Findings, then the answer in sentences, then what is not as expected."""
    from subspace_probe.core.reports import number, span

    source = report.provenance
    about = [source.model, source.data, f"{source.seconds:.0f} s" if source.seconds else ""]
    say((report.study, "bold"), *((f"  {part}", "dim") for part in about if part))
    narrow = console().width < 110
    head = [Column("finding", no_wrap=True), right("estimate")]
    head += [] if narrow else [right("95 % interval"), right("null")]
    head += [right("n"), Column("expected", no_wrap=True), Column("verdict", no_wrap=True)]
    rows: list[Sequence[RenderableType]] = []
    for finding, before in zip(report.findings, (None, *report.findings), strict=False):
        if before and _family(before.name) != _family(finding.name):
            rows.append(())
        spans = [] if narrow else [span(finding.interval), span(finding.null)]
        end = [str(finding.n or ""), mark(finding), verdict(finding.verdict)]
        rows.append([finding.name, number(finding.estimate), *spans, *end])
    grid(head, rows)
    if "summary" in report.tables:
        for sentence in report.tables["summary"].column("sentence"):
            console().print(Text(plain(str(sentence))))
    missed = report.failures()
    for finding in missed:
        reason = f" ({finding.note})" if finding.note else ""
        warn(f"{finding.name} is {number(finding.estimate)}, expected {finding.expected}: {finding.claim}{reason}")


def _family(name: str) -> str:
    """Findings of one family stand together; checks are one family."""
    return "checks" if {"control", "mechanism"} & set(name.split(".")) else "findings"
