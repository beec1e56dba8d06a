"""Contestants timed in turns, and what came out: a table on the terminal, a JSON file beside it.

A machine slows down and recovers while a benchmark runs. So every round times every contestant, in an order that
rotates, and what counts is the median of the ratios to the baseline *of the same round*, with their quartiles. Each
output is compared with the reference as well, since a wrong answer can be had quickly. The ratio of processor times is
given too: on a busy machine it varies less than the clock's, and with one thread nobody waits for anybody.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

LIBRARIES = "torch numpy transformers transformer-lens nnsight pyvene repeng steering-vectors scikit-learn".split()


@dataclass(frozen=True)
class Timed:
    """What a contestant returns that keeps its own time, for instance in a process of its own."""

    seconds: float
    processor: float
    output: Any


@dataclass(frozen=True)
class Contestant:
    """One way to get the result.

    Attributes:
        run: what is timed; None where it cannot be imported, and `note` then says why.
        differs: largest absolute difference of the output from the reference; None where it has nothing to compare.
        note: what a reader must know to judge the number.
    """

    name: str
    run: Callable[[], Any] | None
    differs: Callable[[Any], float] | None = None
    note: str = ""


@dataclass
class Row:
    """What was measured of one contestant; ratios are to the baseline of the same round."""

    name: str
    note: str
    seconds: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])
    ratios: list[float] = field(default_factory=list[float])
    processor_ratios: list[float] = field(default_factory=list[float])
    difference: float | None = None

    @property
    def spread(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios."""
        low, middle, high = quantiles(self.ratios, n=4, method="inclusive") if len(self.ratios) > 1 else self.ratios * 3
        return low, middle, high


def contestant(name: str, build: Callable[[], Callable[[], Any]], **rest: Any) -> Contestant:
    """One whose library may be missing, or of a version that fails: that becomes its note."""
    try:
        return Contestant(name, build(), **rest)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        return Contestant(name, None, note=f"not installed: {type(error).__name__}: {first}")


def measure(contestants: Sequence[Contestant], *, rounds: int, warm_up: int = 1) -> list[Row]:
    """Time every contestant in every round, after rounds that do not count. The first one is the baseline."""
    rows = [Row(one.name, one.note) for one in contestants]
    present = [index for index, one in enumerate(contestants) if one.run is not None]
    for turn in range(-warm_up, rounds):
        start = turn % len(present)
        for index in present[start:] + present[:start]:
            one, row = contestants[index], rows[index]
            assert one.run is not None
            begin, used = time.perf_counter(), time.process_time()
            output = one.run()
            seconds, processor = time.perf_counter() - begin, time.process_time() - used
            if isinstance(output, Timed):
                seconds, processor, output = output.seconds, output.processor, output.output
            if one.differs is not None:
                row.difference = max(one.differs(output), row.difference or 0.0)
            if turn >= 0:
                row.seconds.append(seconds)
                row.processor.append(processor)
        if turn >= 0:
            first = rows[present[0]]
            for row in (rows[index] for index in present):
                row.ratios.append(row.seconds[-1] / first.seconds[-1])
                row.processor_ratios.append(row.processor[-1] / first.processor[-1])
    return rows


def report(title: str, rows: Sequence[Row], *, compared: str, out: Path, name: str, **facts: Any) -> None:
    """Print the table and write the JSON file.

    Args:
        compared: what the differences are of, and from which reference.
        facts: whatever else belongs beside the numbers.
    """
    print(f"\n{title}\nratio: to the first row, median of paired rounds [quartiles]; difference: {compared}")
    print(f"{'':34}{'median s':>10}{'ratio':>8}  {'[quartiles]':14}{'of cpu':>8}{'difference':>12}")
    for row in rows:
        if not row.seconds:
            print(f"{row.name:34}  {row.note}")
            continue
        low, middle, high = row.spread
        wrong = "-" if row.difference is None else f"{row.difference:.2g}"
        print(
            f"{row.name:34}{median(row.seconds):10.3f}{middle:8.3f}  [{low:.3f} {high:.3f}] "
            f"{median(row.processor_ratios):7.3f}{wrong:>12}  {row.note}"
        )
    for key, value in facts.items():
        print(f"{key}: {value}")
    listed = [
        asdict(row)
        | ({"median": median(row.seconds), "ratio": row.spread[1], "quartiles": row.spread[::2]} if row.seconds else {})
        for row in rows
    ]
    body = {"title": title, "difference": compared, "rows": listed, "facts": facts, "machine": machine()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()  # a report of a long run is read while the next one is made


def machine() -> dict[str, Any]:
    """Where it ran: without it the seconds mean nothing."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {library: _version(library) for library in ("subspace-probe", *LIBRARIES)},
    }


def settings(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds, after one that does not count")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    return parser


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
