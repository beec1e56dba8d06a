"""Reports: findings, tables and where they came from. JSON in and out; pictures are drawn from them elsewhere."""

import html
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, final

import numpy as np

from subspace_probe.core.errors import StoreError, unknown
from subspace_probe.core.files import atomic
from subspace_probe.core.findings import Expectation, Finding, Interval

FORMAT = "subspace-probe/report/1"


@final
@dataclass(frozen=True)
class Table:
    """Named columns of equal length: the data behind a figure.

    Attributes:
        columns: names, in order.
        rows: one tuple a row; plain JSON values.
        about: one sentence: what a row is.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    about: str = ""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], about: str = "") -> "Table":
        """A table from records that share their keys."""
        columns = tuple(records[0]) if records else ()
        return cls(columns, tuple(tuple(record[name] for name in columns) for record in records), about)

    def column(self, name: str) -> list[Any]:
        """One column.

        Raises:
            UnknownName: no such column.
        """
        if name not in self.columns:
            raise unknown("column", name, self.columns)
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def where(self, **values: Any) -> "Table":
        """The rows whose columns have the given values."""
        kept = [record for record in self.records() if all(record[name] == value for name, value in values.items())]
        return replace(self, rows=tuple(tuple(record.values()) for record in kept))


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    return dict(_installed_versions())


@cache
def _installed_versions() -> dict[str, str]:  # read from many small files, for every capture
    versions = {"python": platform.python_version()}
    for package in ("subspace-probe", "torch", "transformers", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree or an unpacked wheel
            versions[package] = "not installed"
    return versions


@final
@dataclass(frozen=True)
class Provenance:
    """Where a report came from: enough to run it again.

    Attributes:
        config: every setting, given and defaulted.
        given: the names of those that the user gave.
    """

    model: str = ""
    fingerprint: str = ""
    data: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: tuple[str, ...] = ()
    seed: int = 0
    seconds: float = 0.0
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def now(cls, **fields: Any) -> "Provenance":
        """Provenance stamped with the time and the versions of what computed it."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(created=created, versions=installed_versions(), **fields)


@final
@dataclass(frozen=True)
class Report:
    """What a study found.

    `report.finding("cosine.same_position")` looks one up; `report + findings` extends it.
    """

    study: str
    findings: tuple[Finding, ...] = ()
    tables: Mapping[str, Table] = field(default_factory=dict[str, Table])
    provenance: Provenance = field(default_factory=Provenance)

    def finding(self, name: str) -> Finding:
        """One finding by name.

        Raises:
            UnknownName: no such finding.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise unknown("finding", name, [finding.name for finding in self.findings])

    def failures(self) -> tuple[Finding, ...]:
        """Findings that are not where the study expects them."""
        return tuple(finding for finding in self.findings if not finding.met)

    def __add__(self, other: "Report | Iterable[Finding]") -> "Report":
        if isinstance(other, Report):
            return replace(self, findings=self.findings + other.findings, tables={**self.tables, **other.tables})
        return replace(self, findings=self.findings + tuple(other))

    def to_json(self) -> str:
        """Strict JSON; NaN and infinities become null."""
        body = {
            "format": FORMAT,
            "study": self.study,
            "findings": [asdict(finding) | {"met": finding.met} for finding in self.findings],
            "tables": {name: asdict(table) for name, table in self.tables.items()},
            "provenance": asdict(self.provenance),
        }
        return json.dumps(_plain(body), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            StoreError: not a report.
        """
        try:
            body: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise StoreError(f"Not a report: the text is not JSON ({error}).") from None
        if not isinstance(body, dict) or cast("dict[str, Any]", body).get("format") != FORMAT:
            raise StoreError(f"Not a report of this package: expected format {FORMAT!r}.")
        try:
            return cls._of(cast("dict[str, Any]", body))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"A damaged report: {type(error).__name__} {error}. Run the study again.") from None

    @classmethod
    def _of(cls, body: dict[str, Any]) -> "Report":
        tables = {
            name: Table(tuple(t["columns"]), tuple(tuple(row) for row in t["rows"]), t["about"])
            for name, t in body["tables"].items()
        }
        source: dict[str, Any] = body["provenance"]
        given: dict[str, Any] = {"given": tuple(source["given"])}
        provenance = Provenance(**source | given)
        return cls(body["study"], tuple(_finding(f) for f in body["findings"]), tables, provenance)

    def save(self, path: str | Path) -> Path:
        """Write the JSON; whole or not at all.

        Raises:
            StoreError: the place cannot be written.
        """
        with atomic(Path(path)) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a report's JSON file.

        Raises:
            StoreError: no such file, or not a report.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StoreError(f"No report at {str(path)!r}. A study writes one as report.json.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"Cannot read the report {str(path)!r}: {error}. Give the path of a report.json."
            ) from None
        return cls.from_json(text)

    def _repr_html_(self) -> str:
        def cell(value: object) -> str:
            return f"<td>{html.escape(str(value))}</td>"

        head = "".join(f"<th>{name}</th>" for name in ("finding", "estimate", "95 % interval", "null", "n", "verdict"))
        rows = "".join(
            "<tr>"
            + "".join(map(cell, (f.name, number(f.estimate), span(f.interval), span(f.null), f.n, f.verdict)))
            + "</tr>"
            for f in self.findings
        )
        title = f"<b>{html.escape(self.study)}</b> on {html.escape(self.provenance.model)}"
        return f"{title}<table><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        lines = [f"Report {self.study} on {self.provenance.model}"]
        for f in self.findings:
            spread = f"{span(f.interval):>18}  null {span(f.null):>18}"
            lines.append(f"  {f.name:<32} {number(f.estimate):>8} {spread}  n={f.n:<5} {f.verdict}")
        return "\n".join(lines)


def number(value: float) -> str:
    """A number as reports print it: three significant places."""
    if math.isnan(value):
        return "n/a"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def span(interval: Interval | None) -> str:
    """An interval as reports print it."""
    return "" if interval is None else f"[{number(interval.low)}, {number(interval.high)}]"


def _finding(body: dict[str, Any]) -> Finding:
    def nan(value: float | None) -> float:
        return math.nan if value is None else float(value)

    def interval(value: dict[str, Any] | None) -> Interval | None:
        return None if value is None else Interval(nan(value["low"]), nan(value["high"]), value["level"], value["of"])

    expected = None if body["expected"] is None else Expectation(**body["expected"])
    fields: dict[str, Any] = {k: v for k, v in body.items() if k != "met"}
    fields |= {"interval": interval(body["interval"]), "null": interval(body["null"]), "expected": expected}
    fields["estimate"] = nan(body["estimate"])
    return Finding(**fields)


def _plain(value: Any) -> Any:
    """Plain JSON values: numpy's scalars unwrapped, paths as texts, NaN and infinities as null."""
    if isinstance(value, np.generic):
        return _plain(cast("Any", value).item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value
