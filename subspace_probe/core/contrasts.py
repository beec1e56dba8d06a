"""Prompts with labels, in minimal pairs where they have them.

A `Contrast` is data only: it knows nothing of tokens.
"""

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TypeVar, final

import numpy as np

from subspace_probe.core.errors import ConfigError, DataError, unknown
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.records import Columns, Record, prompt_of, read_csv, read_jsonl

Value = TypeVar("Value")

_WHOLE = re.compile(r"\s*-?\d+\s*")


@final
@dataclass(frozen=True)
class Contrast:
    """Prompts of two classes.

    Args:
        name: what it contrasts.
        prompts: n prompts.
        labels: n labels, 1 for the positive class (harmful, context, she) and 0 for the negative.
        pairs: n integers; equal ones mark a minimal pair. Splits never separate a pair.
        groups: n integers; near-duplicates and common sources. Splits and intervals go by group.
        factors: further labels by name, n integers each (refused, framing, ...).
    """

    name: str
    prompts: tuple[Prompt, ...]
    labels: tuple[int, ...]
    pairs: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    factors: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def __post_init__(self) -> None:
        n = len(self.prompts)
        given = {"pairs": self.pairs, "groups": self.groups}
        columns = {"labels": self.labels, **{name: column for name, column in given.items() if column}, **self.factors}
        wrong = [f"{name} has {len(column)}" for name, column in columns.items() if len(column) != n]
        if wrong:
            raise DataError(f"Contrast {self.name!r} has {n} prompts, but {', '.join(wrong)} entries.")
        if not set(self.labels) <= {0, 1}:
            other = sorted(set(self.labels) - {0, 1})
            raise DataError(f"Contrast {self.name!r} has labels {other}. Labels are 0 (negative) and 1 (positive).")
        if not self.pairs:
            object.__setattr__(self, "pairs", tuple(range(n)))
        if not self.groups:
            object.__setattr__(self, "groups", self.pairs)

    @cached_property
    def key(self) -> str:
        """Hash of prompts, labels, pairs and groups."""
        return content_key([self.prompts, self.labels, self.pairs, self.groups])

    @classmethod
    def from_records(
        cls, records: Iterable[Record], *, name: str, columns: Columns | None = None, label: int | None = None
    ) -> "Contrast":
        """Build a contrast from rows with `prompt` (or `messages`, or `text` for raw text) and `label`.

        Optional columns: `pair`, `group`, `instruction`, `answer`, `foil`, and any further column with whole numbers,
        which becomes a factor.

        Args:
            label: of every row, for files of one class: they need no label column, and must not contradict it.

        Raises:
            DataError: every malformed row at once, each with its file and line; or a class without prompts, where no
                label was said for all.
        """
        columns = columns or Columns()
        rows: list[tuple[Prompt, int, Mapping[str, object]]] = []
        problems: list[str] = []
        for record in records:
            if record.problem:
                problems.append(f"{record.place}: {record.problem}")
                continue
            try:
                rows.append((prompt_of(record, columns), _label(record, columns, label), record.values))
            except DataError as error:
                problems.append(f"{record.place}: {error}")
        if problems:
            more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise DataError("\n".join(problems[:10]) + more)
        numbered = {
            role: _numbered([values.get(column) for _, _, values in rows], role)
            for role, column in (("pairs", columns.pair), ("groups", columns.group))
        }
        contrast = cls(
            name=name,
            prompts=tuple(prompt for prompt, _, _ in rows),
            labels=tuple(label for _, label, _ in rows),
            pairs=numbered["pairs"],
            groups=numbered["groups"],
            factors=_factors([values for _, _, values in rows], columns),
        )
        if label is None:
            contrast.require_both_classes()
        return contrast

    @classmethod
    def from_jsonl(cls, path: str | Path, *, columns: Columns | None = None) -> "Contrast":
        """Read a JSON-lines file: one object a line with `prompt` (or `messages`), `label` 0 or 1, optional `pair`.

        Raises:
            StoreError: no such file.
            DataError: malformed lines, named by number; or a class without prompts.
        """
        return cls.from_records(read_jsonl(Path(path)), name=Path(path).stem, columns=columns)

    @classmethod
    def from_csv(cls, path: str | Path, *, columns: Columns | None = None) -> "Contrast":
        """Read a CSV file with a header line; the columns of `from_jsonl`."""
        return cls.from_records(read_csv(Path(path)), name=Path(path).stem, columns=columns)

    def __len__(self) -> int:
        return len(self.prompts)

    def sides(self) -> "tuple[Contrast, Contrast]":
        """The two sides of every complete minimal pair, in the same order: the positive prompts and the negative ones.

        Each pair gives one prompt a side. Both sides carry the same question for metrics: the `answer` and `foil` that
        they have already, where they agree on them; else the positive's answer, and the negative's as the foil.

        Raises:
            DataError: no pair has both.
        """
        rows: dict[int, dict[int, int]] = {}
        for row, (pair, label) in enumerate(zip(self.pairs, self.labels, strict=True)):
            rows.setdefault(pair, {}).setdefault(label, row)
        both = [(sides[1], sides[0]) for sides in rows.values() if len(sides) == 2]
        if not both:
            raise DataError(
                f"None of the {len(rows)} pairs of {self.name!r} has a positive and a negative prompt. Patching needs "
                "a partner for every prompt: give both the same 'pair' number."
            )
        sides: list[Contrast] = []
        for side in (0, 1):
            part = self.take([pair[side] for pair in both])
            prompts = list(part.prompts)
            for i, (first, second) in enumerate(both):
                one, other = self.prompts[first], self.prompts[second]
                if one.answer and other.answer and one.answer != other.answer:
                    prompts[i] = replace(prompts[i], answer=one.answer, foil=other.answer)
                elif (not one.answer and other.answer) or one.foil != other.foil:
                    # one question for both, the positive's first
                    prompts[i] = replace(prompts[i], answer=one.answer or other.answer, foil=one.foil or other.foil)
            sides.append(replace(part, prompts=tuple(prompts)))
        return sides[0], sides[1]

    def first_pairs(self, n: int) -> "Contrast":
        """The first `n` complete minimal pairs, in their order; all there are where there are fewer."""
        labels: dict[int, set[int]] = {}
        for pair, label in zip(self.pairs, self.labels, strict=True):
            labels.setdefault(pair, set()).add(label)
        kept = {pair for pair, found in labels.items() if len(found) == 2}
        first = set([pair for pair in labels if pair in kept][:n])
        return self.take([row for row, pair in enumerate(self.pairs) if pair in first])

    def require_both_classes(self, least: int = 1) -> None:
        """Check that there is something to contrast.

        Raises:
            DataError: a class with fewer than `least` prompts.
        """
        counts = {label: self.labels.count(label) for label in (0, 1)}
        if min(counts.values()) < least:
            raise DataError(
                f"Contrast {self.name!r} has {counts[1]} positive (label 1) and {counts[0]} negative (label 0) "
                f"prompts. Both classes need at least {least}."
            )

    def take(self, rows: Sequence[int]) -> "Contrast":
        """The given rows, in the given order."""
        return replace(
            self,
            prompts=_picked(self.prompts, rows),
            labels=_picked(self.labels, rows),
            pairs=_picked(self.pairs, rows),
            groups=_picked(self.groups, rows),
            factors={name: _picked(column, rows) for name, column in self.factors.items()},
        )

    def where(self, label: int | None = None, **factors: int) -> "Contrast":
        """The rows with the given label and factor values: `contrast.where(label=1, refused=0)`."""
        for name in factors:
            if name not in self.factors:
                raise unknown("factor", name, self.factors)
        wanted = {name: (self.factors[name], value) for name, value in factors.items()}
        if label is not None:
            wanted["label"] = (self.labels, label)
        return self.take([row for row in range(len(self)) if all(col[row] == value for col, value in wanted.values())])

    def map(self, change: Callable[[Prompt], Prompt]) -> "Contrast":
        """The same contrast with every prompt changed, labels kept."""
        return replace(self, prompts=tuple(change(prompt) for prompt in self.prompts))

    def relabel(self, factor: str) -> "Contrast":
        """The same prompts with a factor as the label; the old label is kept as factor `label`."""
        if factor not in self.factors:
            raise unknown("factor", factor, self.factors)
        factors = {**self.factors, "label": self.labels}
        return replace(self, name=f"{self.name}/{factor}", labels=self.factors[factor], factors=factors)

    def sample(self, n: int, *, seed: int) -> "Contrast":
        """At most n prompts, classes as equal as the data allow, in shuffled order."""
        rng = np.random.default_rng(seed)
        by_label = [rng.permutation([row for row, label in enumerate(self.labels) if label == want]) for want in (0, 1)]
        sizes = [min(len(by_label[0]), (n + 1) // 2), min(len(by_label[1]), n // 2)]
        sizes = [min(len(by_label[0]), n - sizes[1]), min(len(by_label[1]), n - sizes[0])]
        rows = [int(row) for rows, size in zip(by_label, sizes, strict=True) for row in rows[:size]]
        return self.take([rows[int(i)] for i in rng.permutation(len(rows))])

    def split(self, fraction: float, *, seed: int) -> "tuple[Contrast, Contrast]":
        """Two parts that share no pair and no group, the first with about `fraction` of the prompts.

        Raises:
            ConfigError: a fraction outside (0, 1), or too few groups to give both parts one.
        """
        first, second = self.split_rows(fraction, seed=seed)
        return self.take(first), self.take(second)

    def split_rows(self, fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
        """The rows of the two parts of `split`.

        Whole groups go to one side, drawn within strata of equal size and label composition, so that both parts keep
        the balance of the classes. What rounding costs one stratum is made up in the next of the same classes.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"A split of {fraction} was asked for. The fraction lies between 0 and 1.")
        component = components(self.pairs, self.groups)
        members: dict[int, list[int]] = {}
        for row, name in enumerate(component):
            members.setdefault(name, []).append(row)
        strata: dict[tuple[frozenset[int], int, int], list[list[int]]] = {}
        for rows in members.values():
            labels = [self.labels[row] for row in rows]
            strata.setdefault((frozenset(labels), len(rows), sum(labels)), []).append(rows)
        rng = np.random.default_rng(seed)
        chosen: set[int] = set()
        owed: dict[frozenset[int], float] = {}
        for (classes, size, _), blocks in sorted(
            strata.items(), key=lambda stratum: (sorted(stratum[0][0]), stratum[0])
        ):
            wanted = fraction * len(blocks) * size + owed.get(classes, 0.0)
            count = min(len(blocks), max(0, round(wanted / size)))
            owed[classes] = wanted - count * size
            for i in map(int, rng.permutation(len(blocks))[:count]):
                chosen.update(blocks[i])
        rest = [row for row in range(len(self)) if row not in chosen]
        if not chosen or not rest:
            raise ConfigError(
                f"Contrast {self.name!r} cannot be split at {fraction}: it has {len(self)} prompts in {len(members)} "
                "groups, and a split keeps groups together. Add prompts, or choose a fraction nearer to one half."
            )
        return sorted(chosen), rest

    def _repr_html_(self) -> str:
        shown = "".join(
            f"<tr><td>{label}</td><td>{html.escape(prompt.shown)}</td></tr>"
            for prompt, label in list(zip(self.prompts, self.labels, strict=True))[:6]
        )
        positives = sum(self.labels)
        head = f"<b>{html.escape(self.name)}</b>: {positives} positive, {len(self) - positives} negative"
        return f"{head}<table><tr><th>label</th><th>prompt</th></tr>{shown}</table>"

    def __repr__(self) -> str:
        positives = sum(self.labels)
        return f"Contrast({self.name!r}: {positives} positive, {len(self) - positives} negative)"


def components(pairs: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Rows joined by a shared pair or a shared group carry the same number."""
    parent = list(range(len(pairs)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for column in (pairs, groups):
        first: dict[int, int] = {}
        for row, name in enumerate(column):
            parent[find(row)] = find(first.setdefault(name, row))
    return [find(row) for row in range(len(pairs))]


def _picked(column: tuple[Value, ...], rows: Sequence[int]) -> tuple[Value, ...]:
    """These rows of a column; by `itemgetter`, for bootstraps that take rows thousands of times."""
    return itemgetter(*rows)(column) if len(rows) > 1 else tuple(column[row] for row in rows)


def _label(record: Record, columns: Columns, wanted: int | None) -> int:
    if wanted is not None and columns.label not in record.values:
        return wanted
    found = columns.label_of(record)
    if wanted is not None and found != wanted:
        raise DataError(f"{columns.label} is {found}, in a file whose rows are all to be {wanted}. Leave this row out.")
    return found


def _numbered(values: Sequence[object], role: str) -> tuple[int, ...]:
    """Number the distinct values of a column; rows without one stand alone. Empty where the column is absent."""
    if all(value is None or value == "" for value in values):
        return ()
    numbers: dict[object, int] = {}
    out: list[int] = []
    for row, value in enumerate(values):
        alone = value is None or value == ""
        if not alone and not isinstance(value, str | int | float):
            raise DataError(f"A value in the column for {role} is {value!r}. Use a number or a short text.")
        key = ("alone", row) if alone else ("named", value)
        out.append(numbers.setdefault(key, len(numbers)))
    return tuple(out)


def _factors(values: Sequence[Mapping[str, object]], columns: Columns) -> dict[str, tuple[int, ...]]:
    """Every further column that holds a whole number in every row."""
    used = {
        columns.prompt,
        columns.label,
        columns.pair,
        columns.group,
        "messages",
        "text",
        "instruction",
        "answer",
        "foil",
    }
    found: dict[str, tuple[int, ...]] = {}
    names = [name for name in values[0] if name not in used] if values else []
    for name in names:
        column = [row.get(name) for row in values]
        numbers = [int(v) for v in column if isinstance(v, int) or (isinstance(v, str) and _WHOLE.fullmatch(v))]
        if len(numbers) == len(values):
            found[name] = tuple(numbers)
    return found
