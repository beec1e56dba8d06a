"""The command tree, and the one place where errors become messages and exit codes.

0: it ran, whatever it found. 1: what was checked does not hold. 2: something that was asked for cannot be done, said in
one message. 130: interrupted.
"""

import sys
from io import TextIOWrapper
from typing import Annotated, Any, final

import typer
from typer.core import TyperGroup

from subspace_probe import __version__
from subspace_probe.cli import (
    ablate,
    artifacts,
    backends,
    capture,
    compare,
    demo,
    find,
    guard,
    organisms,
    patch,
    report,
    reroute,
    steer,
    study,
    sweep,
)
from subspace_probe.cli.options import PROGRESS
from subspace_probe.cli.terminal import complain, warnings_shown
from subspace_probe.core.errors import SubspaceProbeError

ANYWHERE = ("--quiet", "-q", "--debug")
"""Flags of the whole command that may also stand behind a verb."""


@final
class Verbs(TyperGroup):
    """The top of the command tree. Click reports by subclassing: this is its hook for errors of every verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept the global flags wherever they stand."""
        end = args.index("--") if "--" in args else len(args)
        front = [arg for arg in args[:end] if arg in ANYWHERE]
        return super().parse_args(ctx, front + [arg for arg in args[:end] if arg not in ANYWHERE] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an error of this package ends in one message and exit code 2."""
        try:
            with warnings_shown():
                return super().invoke(ctx)
        except SubspaceProbeError as error:
            if ctx.params.get("debug"):
                raise
            complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("interrupted; nothing was written.")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find directions in language-model activations, intervene on them, and check that they are real.",
    epilog="Start with: subspace-probe demo",
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"subspace-probe {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars. Also behind a verb.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors. Also behind a verb.")] = False,
) -> None:
    PROGRESS.set(not quiet)


app.command("demo")(demo.demo)
app.command("study")(study.study)
app.command("find")(find.find)
app.command("steer")(steer.steer)
app.command("ablate")(ablate.ablate)
app.command("patch")(patch.patch)
app.command("sweep")(sweep.sweep)
app.command("reroute")(reroute.reroute)
app.command("capture")(capture.capture)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("export")(artifacts.export)
app.command("import")(artifacts.import_)
app.command("verify")(artifacts.verify)
app.command("show")(artifacts.show)
app.add_typer(guard.app, name="guard")
app.add_typer(organisms.app, name="organisms")
app.add_typer(backends.app, name="backends")


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # models write what terminals cannot show
    app()
