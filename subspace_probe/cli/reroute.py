"""`subspace-probe reroute`: can the states of one's own model be taken where they should not be, and by whom?

A robustness evaluation: token ids in, token ids out.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli.options import (
    PROGRESS,
    PROMPTS,
    Backend,
    ColumnNames,
    ContrastName,
    Device,
    Dtype,
    ModelName,
    Seed,
    Split,
    Template,
    Words,
    open_contrast,
    open_model,
    sites_of,
)
from subspace_probe.core.errors import ConfigError, SiteError, unknown

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report
    from subspace_probe.core.tokens import Where
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.models.hooked import HookedModel

TARGET = "Target"
SEARCH = "Search"


def reroute(
    model: ModelName,
    contrast: ContrastName,
    free: Annotated[
        str, typer.Option(help="Tokens that may be changed: last-2,last-1 or 7,8 or span:some words.", metavar="WHERE")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and report.html.")] = None,
    direction: Annotated[
        Path | None, typer.Option("--direction", "-d", help="A file that find wrote.", rich_help_panel=TARGET)
    ] = None,
    finder: Annotated[
        str, typer.Option(help="How to find a direction without a file.", rich_help_panel=TARGET)
    ] = "mean_difference",
    site: Annotated[
        str, typer.Option(help="Where, without a file: resid_post is every layer.", rich_help_panel=TARGET)
    ] = "resid_post",
    where: Annotated[str, typer.Option(help="The one token it is read at.", rich_help_panel=TARGET)] = "last",
    label: Annotated[
        int, typer.Option(help="The class whose prompts are rerouted.", min=0, max=1, rich_help_panel=TARGET)
    ] = 1,
    metric: Annotated[
        str, typer.Option(help="Behaviour whose sign is to flip: logit_difference, refusal_score, ...")
    ] = "logit_difference",
    answer: Annotated[str | None, typer.Option(help="Word of the behaviour, where prompts have none.")] = None,
    foil: Annotated[str | None, typer.Option(help="Word of the other behaviour.")] = None,
    budget: Annotated[
        int, typer.Option(help="Rows the model may be run on for each prompt.", min=1, rich_help_panel=SEARCH)
    ] = 1000,
    radius: Annotated[
        float, typer.Option(help="Of embeddings, in distances between tokens.", rich_help_panel=SEARCH)
    ] = 1.0,
    allow: Annotated[
        str | None, typer.Option(help="The only token ids to use, as 16-55,60.", rich_help_panel=SEARCH)
    ] = None,
    ban: Annotated[str | None, typer.Option(help="Token ids not to use, as 8-15.", rich_help_panel=SEARCH)] = None,
    ids_only: Annotated[
        bool, typer.Option("--ids-only", help="Do not ask that ids survive as a text.", rich_help_panel=SEARCH)
    ] = False,
    n: Annotated[int, typer.Option(help="Reroute at most so many prompts.", min=2, rich_help_panel=PROMPTS)] = 50,
    columns: ColumnNames = None,
    split: Split = None,
    allow_model_mismatch: Annotated[
        bool, typer.Option("--allow-model-mismatch", help="Use a direction that was found in another model.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    words: Words = None,
    seed: Seed = 0,
) -> None:
    """Reroute prompts of one class by states, embeddings and tokens, each beside its controls, with a verdict."""
    from time import perf_counter

    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import wrote

    start = perf_counter()
    if out is not None:
        writable_folder(out)
    places, allowed, banned = _free(free), _ids(allow, "--allow"), _ids(ban, "--ban")
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    if (answer is None) != (foil is None):
        raise ConfigError("--answer and --foil belong together. Give both, as --answer No --foil Yes, or neither.")
    if answer is not None:
        prompts = prompts.map(lambda shown: replace(shown, answer=answer, foil=foil))
    train, test = prompts.split(0.5, seed=seed)
    test = _at_most(test, label, n)
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)

    from subspace_probe.diagnostics.climber import Effort
    from subspace_probe.diagnostics.ladder import ladder
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.token_search import TokenSearch

    search = TokenSearch(budget=budget, round_trip=not ids_only, seed=seed)
    effort = Effort(EmbeddingSearch(radius=radius), search)
    if direction is None:
        targets = _found(loaded, train, finder, site, where, label)
    else:
        targets = [_loaded(loaded, train, direction, label, allow_model_mismatch)]
    report = ladder(
        loaded, test, targets, places, metric, train=train, label=label, effort=effort, allowed=allowed,
        banned=banned or (), ineligible="flag", seed=seed, progress=PROGRESS.get(),
    )  # fmt: skip
    config = {**report.provenance.config, "direction": str(direction or finder), "free": free, "budget": budget}
    source = replace(report.provenance, config=config, seconds=perf_counter() - start)
    report = replace(report, provenance=source)
    _show(report)
    if out is not None:
        wrote(*save_report(report, out))


def _free(text: str) -> "list[Where]":
    from subspace_probe.core.tokens import Where

    parts = [text] if text.startswith("span:") else [part.strip() for part in text.split(",")]
    return [Where.parse(part) for part in parts]


def _ids(text: str | None, option: str) -> set[int] | None:
    """`16-55,60` as token ids; None where nothing was given."""
    from subspace_probe.interventions.token_vectors import parse_ids

    if text is None:
        return None
    try:
        return parse_ids(text)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from None


def _at_most(contrast: "Contrast", label: int, n: int) -> "Contrast":
    """At most n prompts of a class, and of the other one."""
    rows = [
        row
        for wanted in (label, 1 - label)
        for row in [row for row, own in enumerate(contrast.labels) if own == wanted][:n]
    ]
    return contrast.take(sorted(rows))


def _found(
    model: "HookedModel", train: "Contrast", finder: str, site: str, where: str, label: int
) -> "list[HalfSpace]":
    from subspace_probe.diagnostics.eligibility import targets_of
    from subspace_probe.finders import FINDERS
    from subspace_probe.finders.permuting import quick

    if finder not in FINDERS:
        raise unknown("finder", finder, list(FINDERS))
    sites = sites_of(site, model.spec.n_layers)
    acts = model.capture(train, sites=sites, where=where, progress=PROGRESS.get())
    return targets_of(acts, quick(FINDERS.load(finder)()), sites, label=label)


def _loaded(model: "HookedModel", train: "Contrast", path: Path, label: int, mismatch: bool) -> "HalfSpace":
    """The target a direction's file draws; how far beyond its threshold is read off the prompts."""
    from subspace_probe.cli.terminal import warn
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import LAST
    from subspace_probe.diagnostics.eligibility import target_from

    subspace = Subspace.load(path)
    if not subspace.found:
        warn("This direction was marked NOT FOUND: nothing beyond what shuffled labels give. Do not read it as one.")
    subspace = subspace.for_any_model() if mismatch else subspace
    subspace.require_model(model.fingerprint)
    if subspace.site is None:
        raise SiteError(f"{str(path)!r} does not say at which site it was found. Find it again.")
    acts = model.capture(train, sites=subspace.site, where=subspace.where or LAST)
    return target_from(subspace, acts, label=label)


def _show(report: "Report") -> None:
    from subspace_probe.cli.terminal import grid, plain, right, say, show_report
    from subspace_probe.core.reports import number

    show_report(replace(report, tables={}))
    if "searches" in report.tables:
        columns = ("flipped", "met", "rows", "found_at", "layer_forwards")
        grid(
            ["site", "search", *map(right, ("flipped", "target met", "rows", "found at", "layer forwards"))],
            [
                [row["site"], row["search"], *(number(row[name]) for name in columns)]
                for row in report.tables["searches"].records()
            ],
        )
    for row in report.tables["verdicts"].records():
        say((f"{row['site']}: ", "dim"), (row["verdict"], "bold"), (f"  {plain(row['reason'])}", "dim"))
