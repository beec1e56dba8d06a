"""Judging JSON lines: what every line gives, what memory it takes, and that an ended run leaves no trace in its file.

What judges here is a stand-in whose scores depend on the whole batch, as a model's do in their last digits, and much
more than those.
"""

import io
import json
import os
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.guard.jsonl import Counts, Scoring
    from subspace_probe.guard.judgements import Judgement

WINDOW = 5


def judge(prompts: "Sequence[Prompt]") -> "list[Judgement]":
    """Scores that no other batch would give; texts with "long" in them cannot be judged."""
    from subspace_probe.core.errors import DataError
    from subspace_probe.guard.judgements import Judgement

    if any("long" in prompt.shown for prompt in prompts):
        raise DataError("a prompt is longer than the context.")
    whole = sum(map(len, (prompt.shown for prompt in prompts)))
    scores = [len(prompt.shown) + whole / 1000 for prompt in prompts]
    return [Judgement(score, score / 100, score > 9, score < 8, 9.0) for score in scores]


def scoring(**settings: Any) -> "Scoring":
    from subspace_probe.guard.jsonl import Scoring

    return Scoring(**{"judge": judge, "name": "in.jsonl", "window": WINDOW, **settings})


def streamed(data: bytes, **settings: Any) -> "tuple[list[dict[str, Any]], Counts]":
    from subspace_probe.guard.jsonl import score_stream

    sink = io.BytesIO()
    counts = score_stream(scoring(**settings), io.BytesIO(data), sink)
    return [json.loads(line) for line in sink.getvalue().splitlines()], counts


def lines(n: int) -> list[bytes]:
    return [json.dumps({"id": f"n{i}", "prompt": "x" * (1 + i % 7)}).encode() + b"\n" for i in range(n)]


# ---------------------------------------------------------------------------------------------------------- every line
def test_every_line_gives_one_in_the_same_order() -> None:
    rows, counts = streamed(b"".join(lines(23)))
    assert [row["index"] for row in rows] == list(range(23))
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(23)]
    for start in range(0, 23, WINDOW):
        batch = rows[start : start + WINDOW]
        whole = sum(1 + row["index"] % 7 for row in batch)
        assert [row["score"] for row in batch] == [1 + row["index"] % 7 + whole / 1000 for row in batch]
    assert counts.lines == 23
    assert counts.flagged == sum(row["flagged"] for row in rows)
    assert counts.abstained == sum(row["abstained"] for row in rows)


def test_what_a_line_may_be() -> None:
    rows = [
        '\ufeff{"prompt": "a", "id": 7}\r',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]}',
        '{"text": "abc", "id": null}',
        '{"prompt": "a\\u2028b", "id": NaN}',
        '{"prompt": "é", "id": "\\ud800"}',
    ]
    found, _ = streamed("\n".join(rows).encode())
    assert [round(row["score"]) for row in found] == [1, 2, 3, 3, 1]
    assert [row.get("id") for row in found] == [7, None, None, None, "\ud800"]
    assert all("error" not in row for row in found)


BAD = [
    (b"", "the line is empty"),
    (b"nonsense", "not JSON (Expecting value at column 1): 'nonsense'"),
    (b"[1]", "a JSON object was expected, found list"),
    (b'{"quest": "a"}', "no column 'prompt' or 'messages'"),
    (b'{"prompt": " "}', "prompt is ' '; it must be a text that is not empty"),
    (b'{"prompt": 3}', "prompt is 3; it must be a text"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "The last message of a prompt is from 'assistant'"),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 13 is 0xff"),
    (b'{"prompt": "too long"}', "a prompt is longer than the context"),
    (b'{"n": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
    (b"[" * 200_000, "JSON that cannot be read"),
    (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', "the line is longer than 1048576 bytes"),
]


@pytest.mark.parametrize(("line", "problem"), BAD, ids=[problem for _, problem in BAD])
def test_a_line_that_cannot_be_judged_is_named_or_skipped(line: bytes, problem: str) -> None:
    from subspace_probe.core.errors import DataError

    good = lines(8)
    data = b"".join(good[:7]) + line + b"\n" + good[7]
    sink = io.BytesIO()
    from subspace_probe.guard.jsonl import score_stream

    with pytest.raises(DataError, match=r"in\.jsonl:8: ") as caught:
        score_stream(scoring(), io.BytesIO(data), sink)
    assert problem in str(caught.value)
    assert sink.getvalue().count(b"\n") == WINDOW  # the window before is written, nothing of this one
    rows, counts = streamed(data, skip_bad=True)
    assert problem in rows[7]["error"]
    assert "score" not in rows[7]
    assert [row["index"] for row in rows] == list(range(9))
    assert ["score" in row for row in rows] == [True] * 7 + [False, True]
    assert (counts.lines, counts.bad) == (9, 1)


def test_what_is_no_fault_of_a_line_ends_the_run() -> None:
    """A control of the above: a model that cannot run must not become a file full of errors."""
    from subspace_probe.core.errors import BackendError

    def broken(prompts: "Sequence[Prompt]") -> "list[Judgement]":
        raise BackendError("out of memory")

    with pytest.raises(BackendError, match="out of memory"):
        streamed(b"".join(lines(3)), skip_bad=True, judge=broken)


# -------------------------------------------------------------------------------------------------------------- memory
class Made(io.RawIOBase):
    """A file that is made while it is read, and never lies anywhere as a whole."""

    def __init__(self, line: bytes, n: int) -> None:
        self.line, self.left, self.rest = line, n, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self.rest) < len(buffer) and self.left:
            self.rest += self.line
            self.left -= 1
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def peak(line: bytes, n: int, **settings: Any) -> int:
    """The most bytes that were held at once while `n` such lines were judged into nothing."""
    from subspace_probe.guard.jsonl import score_stream

    with open(os.devnull, "wb") as sink:
        tracemalloc.start()
        score_stream(scoring(**settings), io.BufferedReader(Made(line, n)), sink)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return held


def test_memory_does_not_grow_with_the_file() -> None:
    """20 MB go through less than 1 MB. Judged all at once they would be held: the control sees it, and the limit in
    bytes on a window ends that too."""
    line = json.dumps({"prompt": "x" * 4000}).encode() + b"\n"
    streamed(line)  # what is loaded on first use is not counted
    assert peak(line, 5_000, window=32) < 1 << 20
    assert 8 << 20 < peak(line, 5_000, window=1_000_000) < 35 << 20


def test_a_line_without_an_end_is_not_held() -> None:
    assert peak(b"x" * 65536, 640, skip_bad=True) < 5 << 20  # 40 MB


# ------------------------------------------------------------------------------------------------------- going on again
def ended(work: Callable[[], object]) -> None:
    """Run in another process, which must be killed on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking: the child runs no threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(out: Path, data: bytes, *, key: str = "k", fresh: bool = False, **settings: Any) -> "Counts":
    from subspace_probe.guard.resuming import score_file

    return score_file(scoring(**settings), io.BytesIO(data), out, key=key, fresh=fresh)


@pytest.mark.parametrize("moment", ["judging", "before writing", "while writing", "after writing"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_killed_anywhere_and_taken_up_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, at: int
) -> None:
    from subspace_probe.guard import resuming

    data = b"".join(lines(23))
    run(tmp_path / "whole.jsonl", data)
    out, append = tmp_path / "out.jsonl", resuming._append
    calls = iter(range(100))

    def judged(prompts: "Sequence[Prompt]") -> "list[Judgement]":
        if next(calls) == at:
            kill()
        return judge(prompts)

    def appended(path: Path, size: int, rows: bytes) -> int:
        if rows and next(calls) == at:
            if moment != "before writing":
                append(path, size, rows[: len(rows) * 2 // 3] if moment == "while writing" else rows)
            kill()
        return append(path, size, rows)

    def work() -> None:
        if moment != "judging":
            resuming._append = appended  # in the other process only
        run(out, data, judge=judged if moment == "judging" else judge)

    ended(work)
    left = out.read_bytes() if out.exists() else b""
    assert len(left) < (tmp_path / "whole.jsonl").stat().st_size or (moment, at) == ("after writing", 4)
    run(out, data, window=99 if left else WINDOW)  # where there was one, the window is the earlier run's
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    if moment == "while writing":  # the control: going on after the last whole line alone gives other numbers
        whole = left[: left.rindex(b"\n") + 1]
        rest = io.BytesIO()
        from subspace_probe.guard.jsonl import score_stream

        score_stream(scoring(), io.BytesIO(b"".join(lines(23)[whole.count(b"\n") :])), rest)
        scores = [json.loads(line)["score"] for line in (whole + rest.getvalue()).splitlines()]
        assert scores != [json.loads(line)["score"] for line in out.read_bytes().splitlines()]


def test_a_finished_run_has_nothing_left_and_more_input_goes_on(tmp_path: Path) -> None:
    out, data = tmp_path / "out.jsonl", lines(23)
    assert run(out, b"".join(data[:20])).lines == 20
    before = out.read_bytes()
    assert run(out, b"".join(data[:20])).lines == 0
    assert out.read_bytes() == before
    assert run(out, b"".join(data)).lines == 3
    assert out.read_bytes().startswith(before)
    assert [json.loads(line)["index"] for line in out.read_bytes().splitlines()] == list(range(23))


def test_a_bad_line_that_was_mended_goes_on(tmp_path: Path) -> None:
    from subspace_probe.core.errors import DataError

    out, data = tmp_path / "out.jsonl", lines(23)
    with pytest.raises(DataError, match=r"in\.jsonl:13: not JSON"):
        run(out, b"".join([*data[:12], b"nonsense\n", *data[13:]]))
    assert out.read_bytes().count(b"\n") == 10
    assert run(out, b"".join(data)).lines == 13
    run(tmp_path / "whole.jsonl", b"".join(data))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_nothing_is_written_over_or_mixed(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StaleStore, StoreError

    out, data = tmp_path / "out.jsonl", lines(23)
    run(out, b"".join(data[:20]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = [*data[:3], lines(5)[4], *data[4:]]
    for changed in (other, data[:10], data[1:]):
        with pytest.raises(StaleStore, match="made from other lines than the first 20"):
            run(out, b"".join(changed))
    with pytest.raises(StaleStore, match="made by another guard"):
        run(out, b"".join(data), key="other")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with out.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(StaleStore, match="has 21 lines, and its record speaks of 15 to 20"):
        run(out, b"".join(data))
    (tmp_path / "out.jsonl.state.json").write_text('{"format": "?"}')
    with pytest.raises(StoreError, match="Cannot read the record"):
        run(out, b"".join(data))
    (tmp_path / "out.jsonl.state.json").unlink()
    with pytest.raises(StoreError, match="without the record of what made it"):
        run(out, b"".join(data))
    assert run(out, b"".join(other), fresh=True, key="other").lines == 23


def test_a_fresh_run_that_fails_at_once_leaves_what_was_there(tmp_path: Path) -> None:
    from subspace_probe.core.errors import DataError

    out = tmp_path / "out.jsonl"
    run(out, b"".join(lines(20)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"in\.jsonl:1"):
        run(out, b"nonsense\n", fresh=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_runs_do_not_write_into_one_file(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError

    out, data, asked = tmp_path / "out.jsonl", b"".join(lines(23)), list[str]()

    def judged(prompts: "Sequence[Prompt]") -> "list[Judgement]":
        with pytest.raises(StoreError, match=r"Another run is writing into .*out\.jsonl") as refused:
            run(out, data, fresh=len(asked) == 1)
        asked.append(str(refused.value))
        return judge(prompts)

    run(out, data, judge=judged)
    assert len(asked) == 5
    run(tmp_path / "whole.jsonl", data)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.glob("*out*")} == {"out.jsonl", "out.jsonl.state.json"}


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    assert run(tmp_path / "out.jsonl", b"").lines == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert run(tmp_path / "out.jsonl", b"".join(lines(2))).lines == 2
