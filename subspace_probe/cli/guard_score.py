"""`subspace-probe guard score`: JSON lines in, JSON lines out."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from subspace_probe.cli.guard_options import Foreign, GuardFolder, OwnModel, open_guard
from subspace_probe.cli.options import PROGRESS, Backend, ColumnNames, Device, Dtype, Template, columns_of
from subspace_probe.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from subspace_probe.guard.jsonl import Counts

PIPE = "-"


def score(
    folder: GuardFolder,
    prompts: Annotated[str, typer.Option("--prompts", "-p", help="A .jsonl file, or - for what comes in.")],
    out: Annotated[str, typer.Option("--out", "-o", help="A .jsonl file, or - for standard output.")] = PIPE,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write a line with an error for a line that cannot be judged.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Write over what lies in --out instead of going on from it.")
    ] = False,
    window: Annotated[int, typer.Option(help="Lines that are held in memory and judged together.", min=1)] = 256,
    columns: ColumnNames = None,
    model: OwnModel = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
) -> None:
    """Judge prompts of a file of any length, one JSON object a line: prompt, messages or text, and id where it has one.

    Every line gives one line, in the same order: id, index, score, probability, flagged, abstained. A run into a file
    that was ended goes on from its last whole line when the same command is given again; OUT.state.json says how far
    it was.
    """
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.guard.jsonl import Scoring, score_stream
    from subspace_probe.guard.resuming import guard_key, score_file

    target = None if out == PIPE else writable_file(Path(out))
    if target is None and fresh:
        raise ConfigError("--fresh was given, but nothing lies in standard output. Leave it out, or give --out FILE.")
    roles = columns_of(columns)
    with _opened(prompts, target) as source, _warnings_beside(target):
        guard = open_guard(
            folder, model, device=device, dtype=dtype, backend=backend, template=template,
            allow_model_mismatch=allow_model_mismatch,
        )  # fmt: skip
        name = "<stdin>" if prompts == PIPE else Path(prompts).name
        with _bar() as advance:
            scoring = Scoring(guard.judge, name, columns=roles, window=window, skip_bad=skip_bad, on_window=advance)
            try:
                if target is None:
                    counts = score_stream(scoring, source, typer.get_binary_stream("stdout"))
                else:
                    counts = score_file(
                        scoring, source, target, key=guard_key(guard, roles, skip_bad=skip_bad), fresh=fresh
                    )
            except KeyboardInterrupt:
                _say_interrupted(target)
                raise typer.Exit(130) from None
    _say(counts, target)


@contextmanager
def _opened(prompts: str, target: Path | None) -> Generator[BinaryIO]:
    if prompts == PIPE:
        yield typer.get_binary_stream("stdin")
        return
    path = Path(prompts)
    if target is not None and target.exists() and path.exists() and path.samefile(target):
        raise ConfigError(f"{prompts!r} is both the input and the output. Choose another --out.")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise StoreError(f"No file {prompts!r}. Give a .jsonl file, or - for standard input.") from None
    except OSError as error:
        raise StoreError(f"Cannot read {prompts!r}: {error.strerror}.") from None
    with file:
        yield file


@contextmanager
def _warnings_beside(target: Path | None) -> Generator[None]:
    """Keep what is warned of out of standard output, where that is the result."""
    from subspace_probe.cli.terminal import plain

    if target is not None:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        yield
    for message in dict.fromkeys(plain(str(each.message)) for each in caught):
        typer.echo(f"! {message}", err=True)


@contextmanager
def _bar() -> "Generator[Callable[[Counts], None]]":
    from tqdm.auto import tqdm

    with tqdm(desc="lines", unit="", disable=not PROGRESS.get(), leave=False) as bar:

        def advance(counts: "Counts") -> None:
            bar.update(counts.lines - bar.n)

        yield advance


def _say(counts: "Counts", target: Path | None) -> None:
    from subspace_probe.cli.terminal import wrote

    bad = f", {counts.bad} could not be judged" if counts.bad else ""
    abstained = f", abstained on {counts.abstained}" if counts.abstained else ""
    judged = f"{counts.lines} lines: flagged {counts.flagged}{abstained}{bad}."
    typer.echo(judged if counts.lines else "Nothing new to judge.", err=target is None)
    if target is not None:
        wrote(target)


def _say_interrupted(target: Path | None) -> None:
    from subspace_probe.cli.terminal import complain

    complain("interrupted." if target is None else f"interrupted; the same command goes on from there: {target}")
