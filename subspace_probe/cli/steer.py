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
    from subspace_probe.interventions.steer import Unit

EFFECT = "Effect on a word"
RULE = "Steer only where"


def steer(
    model: ModelName,
    direction: Annotated[Path, typer.Option("--direction", "-d", help="A file that find wrote.")],
    strength: Annotated[
        list[str],
        typer.Option("--strength", "-s", metavar="NUMBER,...", help="In units of --unit, as 1 or -1,1,2."),
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
    unit: Annotated[
        str, typer.Option(help="scale: the class gap; norm: shares of each state's norm; raw: activation units.")
    ] = "scale",
    keep_norm: Annotated[
        bool, typer.Option("--keep-norm", help="Give steered states the norm they had before.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the completions.", min=1)] = 32,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Run every strength, even behind one where the text degenerates.")
    ] = False,
    words: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The same request in words, put before every prompt, as a baseline."),
    ] = None,
    when: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only where this direction scores --threshold.", rich_help_panel=RULE),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Least score, counted from the direction's origin.", rich_help_panel=RULE)
    ] = 0.0,
    decided_at: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that decides for its prompt, as t_inst; else each for itself.",
            rich_help_panel=RULE,
        ),
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Word whose logit is measured.", rich_help_panel=EFFECT)] = None,
    foil: Annotated[str | None, typer.Option(help="Word it is measured against.", rich_help_panel=EFFECT)] = None,
    random: Annotated[
        int, typer.Option(help="Random directions behind the verdict, which takes 39.", min=0, rich_help_panel=EFFECT)
    ] = 40,
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

    from subspace_probe.diagnostics.strengths import strength_sweep
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    rule = None
    if when is None and (threshold or decided_at is not None):
        raise ConfigError("--threshold and --decided-at say when a direction of --when allows it. Give --when FILE.")
    if when is not None:
        probe = Subspace.load(when)
        decides = None if decided_at is None else Where.parse(decided_at)
        rule = Score(probe.for_any_model() if allow_model_mismatch else probe, threshold, where=decides)
    steered = Steer(subspace, strengths[0], place, tokens, _unit(unit), keep_norm, rule)
    loaded.check(steered)
    report = strength_sweep(
        loaded,
        steered,
        prompts,
        "logit_difference" if all(shown.answer and shown.foil for shown in prompts.prompts) else None,
        strengths,
        draws=random,
        words=words,
        show=len(prompts) if prompt else show,
        max_new_tokens=max_new_tokens,
        stop=not keep_going,
        seed=seed,
        progress=progress,
    )
    config = {**report.provenance.config, "direction": str(direction), "when": None if when is None else str(when)}
    source = replace(report.provenance, config=config, seconds=perf_counter() - start)
    report = replace(report, provenance=source)
    _show(report, subspace)
    if out is not None:
        wrote(*save_report(report, out))


def _unit(name: str) -> "Unit":
    from subspace_probe.core.errors import unknown
    from subspace_probe.interventions.steer import UNITS

    for unit in UNITS:
        if unit == name:
            return unit
    raise unknown("unit", name, UNITS)


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
    rows = report.tables["completions"].records() if "completions" in report.tables else []
    for shown in dict.fromkeys(row["prompt"] for row in rows):
        said = [(row["condition"], row["text"]) for row in rows if row["prompt"] == shown]
        grid(
            [Column("", style="dim", no_wrap=True, min_width=14), Text(plain(shown))],
            [(condition, plain(text)) for condition, text in said],
        )
    if "text" in report.tables and (broken := report.tables["text"].where(degenerate=True).column("strength")):
        warn(f"The text degenerates at {', '.join(f'{strength:+g}' for strength in broken)}: see the report's summary.")
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
