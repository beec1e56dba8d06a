"""`subspace-probe guard`: a classifier on a model's own states, from prompts to a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli import guard_fit, guard_score, guard_serve
from subspace_probe.cli.guard_options import Foreign, GuardFolder, OwnModel, open_guard, open_negatives
from subspace_probe.cli.options import (
    PROGRESS,
    PROMPTS,
    Backend,
    ColumnNames,
    ContrastName,
    Device,
    Dtype,
    Seed,
    Split,
    Template,
    open_contrast,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from subspace_probe.core.findings import Finding
    from subspace_probe.core.reports import Report
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel

Slices = Annotated[str, typer.Option(help="Columns to report by, with commas.")]

app = typer.Typer(no_args_is_help=True, help="A guard that reads the model's own states: fit, measure, use, serve.")
app.command("fit")(guard_fit.fit)
app.command("threshold")(guard_fit.threshold)
app.command("score")(guard_score.score)
app.command("serve")(guard_serve.serve)


@app.command("eval")
def evaluate(
    folder: GuardFolder,
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("guard-report"),
    train: Annotated[
        str | None,
        typer.Option(help="What it was fitted on, or the like: for baselines and nulls.", rich_help_panel=PROMPTS),
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Part of --train, where that has parts.", rich_help_panel=PROMPTS)
    ] = None,
    hard_benign: Annotated[
        str | None,
        typer.Option(help="Benign prompts that look harmful; needs no labels.", rich_help_panel=PROMPTS),
    ] = None,
    slices: Slices = "",
    source: Annotated[str | None, typer.Option(help="Column that says where a prompt comes from.")] = None,
    refused: Annotated[str | None, typer.Option(help="Column of --train that says what the model refused.")] = None,
    columns: ColumnNames = None,
    split: Split = None,
    model: OwnModel = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Measure a guard on prompts that it has not seen, beside baselines and controls, and write the report.

    The report is written whatever comes out; the exit code is 1 where something is not as it should be, or where the
    rate of false positives that the threshold promises is refuted.
    """
    from subspace_probe.cli.outputs import writable_folder

    writable_folder(out)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    fitted = None if train is None else open_contrast(train, columns=columns, split=train_split, seed=seed)
    hard = None if hard_benign is None else open_negatives(hard_benign, columns=columns, seed=seed)
    guard = open_guard(
        folder, model, device=device, dtype=dtype, backend=backend, template=template,
        allow_model_mismatch=allow_model_mismatch,
    )  # fmt: skip
    report = guard.report(
        prompts,
        train=fitted,
        hard_benign=hard,
        slices=_names(slices),
        source=source,
        refused=refused,
        seed=seed,
        progress=PROGRESS.get(),
    )
    promise = [finding for finding in report.findings if finding.name == "fpr.at_threshold"]
    _finish(report, out, broken=[finding for finding in promise if finding.verdict == "refuted"])


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that guard fit wrote.")],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="Another one.")],
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("guard-comparison"),
    slices: Slices = "",
    columns: ColumnNames = None,
    split: Split = None,
    model: OwnModel = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Is one guard better than another? Paired differences on prompts that neither has seen.

    The guards may sit on different models; --model is then left out, and each one's own is loaded.
    """
    from subspace_probe.cli.outputs import writable_folder
    from subspace_probe.guard.artifact import describe_saved
    from subspace_probe.guard.comparison import compare_guards

    writable_folder(out)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    same = describe_saved(first)["model"] == describe_saved(second)["model"] or model is not None

    def opened(folder: Path, on: "str | HookedModel | None") -> "LatentGuard":
        return open_guard(
            folder, on, device=device, dtype=dtype, backend=backend, template=template,
            allow_model_mismatch=allow_model_mismatch,
        )  # fmt: skip

    one = opened(first, model)
    other = opened(second, one.model if same else None)
    names = (str(first), str(second))
    _finish(compare_guards(one, other, prompts, slices=_names(slices), names=names, seed=seed), out)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _finish(report: "Report", out: Path, broken: "Sequence[Finding]" = ()) -> None:
    from subspace_probe.cli.outputs import save_report
    from subspace_probe.cli.terminal import show_report, warn, wrote

    paths = save_report(report, out)
    show_report(report)
    for finding in broken:
        warn(f"{finding.name} is {finding.estimate:.3g}: {finding.note or finding.claim}")
    wrote(*paths)
    if broken or report.failures():
        raise typer.Exit(1)
