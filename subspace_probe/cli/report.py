"""`subspace-probe report`: draw a report again from its JSON, without the model."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    file: Annotated[Path, typer.Argument(help="A report.json.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the page. Default: beside the JSON.")
    ] = None,
) -> None:
    """Show a report and draw its page again."""
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.cli.terminal import show_report, wrote
    from subspace_probe.core.reports import Report

    page = writable_file(out or file.with_suffix(".html"))
    loaded = Report.load(file)
    from subspace_probe.figures import save_html

    save_html(loaded, page)
    show_report(loaded)
    wrote(page)
