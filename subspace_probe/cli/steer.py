"""`subspace-probe steer`: what a direction does when it is added, beside a random one of equal norm."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli.options import (
    PROGRESS,
    PROMPTS,
    Backend,
    ColumnNames,
    Device,
    Dtype,
    MaybeContrast,
    ModelName,
    Seed,
    Split,
    Template,
    open_contrast,
    open_model,
)
from subspace_probe.core.errors import ConfigError

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report
    from subspace_probe.core.subspaces import Subspace

EFFECT = "Effect on a word"


def steer(
    model: ModelName,
    direction: Annotated[Path, typer.Option("--direction", "-d", help="A file that find wrote.")],
    strength: Annotated[
        list[str],
        typer.Option("--strength", "-s", metavar="NUMBER,...", help="In units of the class gap, as 1 or -1,1,2."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt. Repeatable.", rich_help_panel=PROMPTS),
    ] = None,
    contrast: MaybeContrast = None,
    columns: ColumnNames = None,
    split: Split = None,
    show: Annotated[
        int, typer.Option(help="Complete so many prompts of a contrast.", min=0, rich_help_panel=PROMPTS)
    ] = 4,
    where: Annotated[str, typer.Option(help="Tokens to steer: all, last, generated, t_inst, ...")] = "all",
    site: Annotated[str | None, typer.Option(help="L3.resid_post; default is where it was found.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the completions.", min=1)] = 32,
    answer: Annotated[str | None, typer.Option(help="Word whose logit is measured.", rich_help_panel=EFFECT)] = None,
    foil: Annotated[str | None, typer.Option(help="Word it is measured against.", rich_help_panel=EFFECT)] = None,
    random: Annotated[
        int, typer.Option(help="Random directions of equal norm behind the verdict.", min=0, rich_help_panel=EFFECT)
    ] = 20,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and report.html.")] = None,
    allow_model_mismatch: Annotated[
        bool, typer.Option("--allow-model-mismatch", help="Use a direction that was found in another model.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Add a direction at several strengths: completions side by side, and with --answer and --foil its effect."""
    from time import perf_counter

    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import wrote
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where

    start = perf_counter()
    if out is not None:
        writable_folder(out)
    strengths, tokens = _strengths(strength), Where.parse(where)
    place = None if site is None else Site.parse(site)
    prompts = _prompts(prompt, contrast, columns=columns, split=split, seed=seed)
    if (answer is None) != (foil is None):
        raise ConfigError("--answer and --foil belong together. Give both, as --answer She --foil He, or neither.")
    if answer is not None:
        prompts = prompts.map(lambda shown: replace(shown, answer=answer, foil=foil))
    subspace = Subspace.load(direction)
    progress = PROGRESS.get()
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template)
    subspace = subspace.for_any_model() if allow_model_mismatch else subspace
    subspace.require_model(loaded.fingerprint)

    from subspace_probe.cli.steering import Steering
    from subspace_probe.core.reports import Report
    from subspace_probe.interventions.steer import Steer

    doses = [Steer(subspace, value, site=place, where=tokens) for value in strengths]
    for edited in doses[0].edits(loaded.spec.n_layers):
        subspace.require_width(loaded.backend.width(edited))
    steering = Steering(loaded, doses, prompts, draws=random, seed=seed, progress=progress)
    texts = steering.completions(len(prompts) if prompt else show, max_new_tokens)
    report = steering.effects() if steering.measurable else Report("steer")
    settings = {
        "direction": str(direction),
        "where": where,
        "site": site or (subspace.site.short if subspace.site else ""),
        "max_new_tokens": max_new_tokens,
    }
    source = steering.provenance(seconds=perf_counter() - start, **settings)
    report = replace(report, tables={**report.tables, "completions": texts}, provenance=source)
    _show(report, subspace)
    if out is not None:
        wrote(*save_report(report, out))


def _strengths(given: list[str]) -> list[float]:
    """Numbers, from texts that may hold several each."""
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    try:
        found = [float(part) for part in parts]
    except ValueError:
        raise ConfigError(
            f"--strength {','.join(given)!r} is not a list of numbers. Write for instance 1,2,-1."
        ) from None
    if not found or not all(map(math.isfinite, found)):
        raise ConfigError(f"--strength {','.join(given)!r} was given. Give finite numbers, for instance 1,2,-1.")
    return list(dict.fromkeys(found))


def _prompts(
    texts: list[str] | None, contrast: str | None, *, columns: str | None, split: str | None, seed: int
) -> "Contrast":
    """The prompts to steer on, from one of the two ways to give them."""
    if bool(texts) == bool(contrast):
        given = "Both --prompt and --contrast" if texts else "Neither --prompt nor --contrast"
        raise ConfigError(f"{given} were given. Give prompts in one of the two ways.")
    if contrast:
        return open_contrast(contrast, columns=columns, split=split, seed=seed)
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    shown = tuple(Prompt(text=text) for text in texts or ())
    return Contrast("prompts", shown, (0,) * len(shown))


def _show(report: "Report", subspace: "Subspace") -> None:
    from rich.table import Column
    from rich.text import Text

    from subspace_probe.cli.terminal import grid, plain, right, say, verdict, warn
    from subspace_probe.core.reports import number, span

    if not subspace.found:
        warn("This direction was marked NOT FOUND: nothing beyond what shuffled labels give. Do not read it as one.")
    rows = report.tables["completions"].records()
    for shown in dict.fromkeys(row["prompt"] for row in rows):
        said = [(row["condition"], row["text"]) for row in rows if row["prompt"] == shown]
        grid(
            [Column("", style="dim", no_wrap=True, min_width=14), Text(plain(shown))],
            [(condition, plain(text)) for condition, text in said],
        )
    if "doses" not in report.tables:
        return
    doses = report.tables["doses"]
    say((doses.about, "bold"))
    numbers = ("unsteered", "steered", "change", "95 % interval", "random", "wrong way", "n")
    grid(
        [right("strength"), *map(right, numbers), "verdict"],
        [
            [
                f"{dose['strength']:+g}", number(dose["unsteered"]), number(dose["steered"]), number(f.estimate),
                span(f.interval), span(f.null), f"{dose['wrong_way']:.0%}", str(f.n), verdict(f.verdict),
            ]
            for dose, f in zip(doses.records(), report.findings, strict=False)
        ],
    )  # fmt: skip
    for finding in report.findings[len(doses.rows) :]:
        say((f"{finding.name}: ", "dim"), verdict(finding.verdict), (f"  {finding.note}", "dim"))
    if report.findings[0].n == 1:
        warn("One prompt gives no interval, so no verdict. Repeat --prompt, or give a --contrast.")
