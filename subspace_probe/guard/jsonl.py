"""Judging JSON lines, streams larger than memory too: a window of lines at a time.

Every line of the input gives one line of the output, in the same order.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol, final, runtime_checkable

from subspace_probe.core.errors import DataError, PositionError, ShapeError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.records import Columns, Record, prompt_of, record_of
from subspace_probe.guard.judgements import Judgement

LONGEST = 1 << 20
"""Bytes of a line; a longer one is an error, so that memory is bounded whatever comes."""
WINDOW, WINDOW_BYTES = 256, 1 << 23
"""Lines that are held and judged together: so many, or as many as reach so many bytes."""

Judge = Callable[[Sequence[Prompt]], Sequence[Judgement]]


Row = tuple[bytes, Judgement | None]
"""A line of the output, with what it says."""


@runtime_checkable
class Source(Protocol):
    """A stream of bytes to read lines from."""

    def readline(self, size: int, /) -> bytes: ...


@runtime_checkable
class Sink(Protocol):
    """A stream to write bytes to."""

    def write(self, data: bytes, /) -> int: ...
    def flush(self) -> None: ...


@final
@dataclass
class Counts:
    """What a run has done so far: lines it wrote, and what became of them."""

    lines: int = 0
    flagged: int = 0
    abstained: int = 0
    bad: int = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Count lines that were written."""
        judged = [what for _, what in rows if what is not None]
        self.lines += len(rows)
        self.flagged += sum(what.flagged for what in judged)
        self.abstained += sum(what.abstained for what in judged)
        self.bad += len(rows) - len(judged)


@final
@dataclass(frozen=True)
class Scoring:
    """How lines are judged.

    Args:
        judge: `LatentGuard.judge`, or what stands for it.
        name: of the input, for errors.
        columns: which column means what.
        window: lines that are judged together.
        skip_bad: a line that cannot be judged gives a line that says why; without it, it ends the run.
        on_window: called with the counts after every window.
    """

    judge: Judge
    name: str = "input"
    columns: Columns = field(default_factory=Columns)
    window: int = WINDOW
    skip_bad: bool = False
    on_window: Callable[[Counts], None] = lambda counts: None

    def rows(self, lines: Sequence[bytes], start: int) -> list[Row]:
        """Output lines for the input's lines from number `start` on, counted from 0.

        Raises:
            DataError: the first line that cannot be judged, unless bad ones are skipped.
        """
        records = [_record(line, f"{self.name}:{start + i + 1}", first=start + i == 0) for i, line in enumerate(lines)]
        read = [_read(record, self.columns) for record in records]
        self._check(records, read)
        prompts = {row: prompt for row, prompt in enumerate(read) if isinstance(prompt, Prompt)}
        judged = dict(zip(prompts, _judged(self.judge, [*prompts.values()]), strict=True))
        said = [judged.get(row, str(problem)) for row, problem in enumerate(read)]
        self._check(records, said)
        return [_row(start + i, record, what) for i, (record, what) in enumerate(zip(records, said, strict=True))]

    def _check(self, records: Sequence[Record], found: Sequence[object]) -> None:
        if self.skip_bad:
            return
        for record, what in zip(records, found, strict=True):
            if isinstance(what, str):
                raise DataError(f"{record.place}: {what}")


def score_stream(scoring: Scoring, source: Source, sink: Sink) -> Counts:
    """Judge every line of a stream into another.

    Raises:
        DataError: a line that cannot be judged, unless bad ones are skipped; those before its window are written.
    """
    counts = Counts()
    for window in windows_of(lines_of(source), scoring.window):
        rows = scoring.rows(window, counts.lines)
        sink.write(b"".join(line for line, _ in rows))
        sink.flush()
        counts.add(rows)
        scoring.on_window(counts)
    return counts


def lines_of(source: Source) -> Iterator[bytes]:
    """Lines without their end. Of one that is too long, a beginning that is too long."""
    while line := source.readline(LONGEST + 2):
        rest = line
        while len(rest) == LONGEST + 2 and not rest.endswith(b"\n"):
            rest = source.readline(LONGEST + 2)
        yield line.removesuffix(b"\n")


def windows_of(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Lines that are judged together: `size` of them, fewer where they are long."""
    window: list[bytes] = []
    held = 0
    for line in lines:
        window.append(line)
        held += len(line)
        if len(window) == size or held >= WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def _record(line: bytes, place: str, *, first: bool) -> Record:
    if len(line) > LONGEST:
        return Record(place, {}, f"the line is longer than {LONGEST} bytes.")
    try:
        return record_of(line.decode("utf-8-sig" if first else "utf-8"), place)
    except UnicodeDecodeError as error:
        return Record(place, {}, f"not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}.")


def _read(record: Record, columns: Columns) -> Prompt | str:
    """The prompt of a row, or why there is none."""
    if record.problem:
        return record.problem
    try:
        prompt = prompt_of(record, columns)
        "".join([prompt.text, *(turn["role"] + turn["content"] for turn in prompt.messages)]).encode()
    except DataError as error:
        return str(error)
    except UnicodeEncodeError:
        return "the text holds half of a surrogate pair, which is no character."
    return prompt


def _judged(judge: Judge, prompts: Sequence[Prompt]) -> Sequence[Judgement | str]:
    """What is said of each; where some cannot be judged, the rest by halves, and of those why."""
    if not prompts:
        return []
    try:
        return judge(prompts)
    except (DataError, PositionError, ShapeError) as error:
        if len(prompts) == 1:
            return [str(error)]
    half = len(prompts) // 2
    return [*_judged(judge, prompts[:half]), *_judged(judge, prompts[half:])]


def _row(index: int, record: Record, what: Judgement | str) -> Row:
    known = record.values.get("id")
    named = isinstance(known, str | int | float) and known not in (inf, -inf) and known == known
    row: dict[str, object] = {"id": known, "index": index} if named else {"index": index}
    if isinstance(what, str):
        return json.dumps(row | {"error": what}).encode() + b"\n", None
    row |= {"score": what.score, "probability": what.probability, "flagged": what.flagged, "abstained": what.abstained}
    return json.dumps(row).encode() + b"\n", what
