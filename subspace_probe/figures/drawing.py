"""What a figure is: the tables it needs, how it is drawn, and how to read it. It draws numbers; it makes none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import plotly.graph_objects as go

from subspace_probe.core.errors import ConfigError, unknown
from subspace_probe.core.reports import Report
from subspace_probe.figures.theme import dressed


def _nothing(report: Report) -> Sequence[str]:
    return ()


@final
@dataclass(frozen=True)
class Drawing:
    """One kind of figure.

    Attributes:
        title: the question that it answers, short enough for one line.
        reading: one sentence: what to look for.
        needs: the tables that it draws, and the columns it reads of each.
        plot: draws a report that has these tables.
        findings: names of findings whose own sentences the page prints below, where the report has them.
        beside: further paragraphs, made from the report.
    """

    title: str
    reading: str
    needs: Mapping[str, tuple[str, ...]]
    plot: Callable[[Report], go.Figure]
    findings: tuple[str, ...] = ()
    beside: Callable[[Report], Sequence[str]] = _nothing

    def drawable(self, report: Report) -> bool:
        """Whether the report has rows in every table that is needed."""
        return all(name in report.tables and report.tables[name].rows for name in self.needs)

    def __call__(self, report: Report) -> go.Figure:
        """Draw it.

        Raises:
            ConfigError: the report lacks a table, or the table has no rows.
            UnknownName: a table lacks a column.
        """
        for name, columns in self.needs.items():
            if name not in report.tables or not report.tables[name].rows:
                raise ConfigError(
                    f"{self.title!r} is drawn from the table {name!r}, which the report {report.study!r} does not have "
                    f"or has no rows of. It has: {', '.join(report.tables) or 'none'}."
                )
            for column in columns:
                if column not in report.tables[name].columns:
                    raise unknown(f"column of the table {name!r}", column, report.tables[name].columns)
        return dressed(self.plot(report), self.title)
