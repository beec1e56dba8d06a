"""`subspace-probe ablate`: take a direction or a whole state out, see what is left, and write it into the weights."""

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
from subspace_probe.cli.patch import Foreign, MetricName, Out
from subspace_probe.core.errors import BackendError, ConfigError, StoreError, unknown

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Table
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.models.hooked import HookedModel

MODES = ("zero", "mean", "resample")
REFERENCE = "What takes its place"


def ablate(
    model: ModelName,
    contrast: ContrastName,
    direction: Annotated[
        Path | None, typer.Option("--direction", "-d", help="A file of find; without it whole states go.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(help="L3.attn_out, resid_post, ...; default, for a direction, is all that writes to the stream."),
    ] = None,
    where: Annotated[str, typer.Option(help="Tokens: all, last, t_inst, ...")] = "all",
    mode: Annotated[
        str, typer.Option(help=f"What takes its place: {', '.join(MODES)}.", rich_help_panel=REFERENCE)
    ] = "zero",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="CONTRAST", help="Prompts of the mean; default is those of --contrast.", rich_help_panel=REFERENCE
        ),
    ] = None,
    metric: MetricName = "logit_difference",
    random: Annotated[int, typer.Option(help="Random directions behind the verdict, which takes 39.", min=0)] = 40,
    columns: ColumnNames = None,
    split: Split = None,
    show: Annotated[int, typer.Option(help="Complete so many prompts.", min=0, rich_help_panel=PROMPTS)] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the completions.", min=1)] = 32,
    save_model: Annotated[
        Path | None,
        typer.Option("--save-model", metavar="FOLDER", help="Write the ablation into the weights, as a checkpoint."),
    ] = None,
    out: Out = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    words: Words = None,
    seed: Seed = 0,
) -> None:
    """Take a direction out of the model's states: what changes, and does taking out a random one change as much?"""
    from dataclasses import replace
    from time import perf_counter

    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import show_report, wrote
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where
    from subspace_probe.diagnostics.auditing import audit
    from subspace_probe.diagnostics.integrity import Integrity
    from subspace_probe.diagnostics.measuring import measure
    from subspace_probe.diagnostics.random_controls import RandomControls

    start = perf_counter()
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if save_model is not None and (direction is None or mode != "zero" or site is not None or where != "all"):
        raise ConfigError(
            "--save-model writes a direction's ablation everywhere into the weights. Give --direction, and leave out "
            "--site, --where and --mode."
        )
    for folder in filter(None, (out, save_model)):
        writable_folder(folder)
    if save_model is not None and save_model.is_dir() and any(save_model.iterdir()):
        raise StoreError(
            f"{str(save_model)!r} holds files already, and a checkpoint is a folder of its own. Name another."
        )
    tokens = Where.parse(where)
    subspace = None if direction is None else Subspace.load(direction)
    if subspace is not None and allow_model_mismatch:
        subspace = subspace.for_any_model()
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    mean_of = prompts if reference is None else open_contrast(reference, columns=columns, split=split, seed=seed)
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)
    edit = _ablation(loaded, subspace, site, tokens, mode, mean_of, seed)
    report = measure(loaded, edit, prompts, metric, seed=seed)
    if subspace is not None:
        checks = [Integrity(), RandomControls(draws=random)] if random else [Integrity()]
        report += audit(loaded, edit, prompts, metric, checks=checks, seed=seed, progress=PROGRESS.get())
    texts = _completions(loaded, edit, prompts, show, max_new_tokens)
    source = replace(report.provenance, seconds=perf_counter() - start)
    report = replace(report, study="ablate", tables={**report.tables, **texts}, provenance=source)
    show_report(report)
    if out is not None:
        wrote(*save_report(report, out))
    if save_model is not None and subspace is not None:
        _save(loaded, subspace, edit, prompts, save_model)


def _ablation(
    model: "HookedModel",
    subspace: "Subspace | None",
    site: str | None,
    where: "Where",
    mode: str,
    reference: "Contrast",
    seed: int,
) -> "Ablate":
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.sources import Source

    if site is None and (subspace is None or mode != "zero"):
        raise ConfigError("Name the sites that are ablated, as --site L3.resid_post or --site mlp_out.")
    sites = None if site is None else sites_of(site, model.spec.n_layers)
    if mode == "zero" or sites is None:
        return Ablate(subspace, sites, where)
    if mode == "mean":
        return Ablate(subspace, sites, where, Source.mean(model.capture(reference, sites=sites, where=where)))
    if not where.single:
        raise ConfigError(f"--mode resample exchanges one token a prompt, not {str(where)!r}. Give --where last.")
    return Ablate(
        subspace, sites, where, Source.resampled(model.capture(reference, sites=sites, where=where), seed=seed)
    )


def _completions(
    model: "HookedModel", edit: "Ablate", prompts: "Contrast", show: int, max_new_tokens: int
) -> "dict[str, Table]":
    from subspace_probe.core.reports import Table

    if not show:
        return {}
    shown = prompts.prompts[:show]
    before, after = (
        model.generate(shown, interventions=edits, max_new_tokens=max_new_tokens) for edits in ([], [edit])
    )
    rows = [
        (prompt.shown, condition, text)
        for prompt, *texts in zip(shown, before, after, strict=True)
        for condition, text in zip(("as it is", "ablated"), texts, strict=True)
    ]
    return {"completions": Table(("prompt", "condition", "text"), tuple(rows), "greedy continuations")}


def _save(model: "HookedModel", subspace: "Subspace", edit: "Ablate", prompts: "Contrast", folder: Path) -> None:
    """Bake it in, and compare with the run-time ablation before anything is written."""
    from subspace_probe.cli.terminal import say, wrote
    from subspace_probe.interventions.orthogonal import orthogonalize_weights, save_checkpoint

    baked = orthogonalize_weights(model, subspace)
    some = prompts.prompts[:32]
    wanted, found = model.logits(some, interventions=[edit]), baked.logits(some)
    off = float((found - wanted).abs().max())
    if not off <= 0.05 * float(wanted.abs().max()):
        raise BackendError(
            f"The baked weights' logits differ from the run-time ablation by {off:.2g}. Nothing was written."
        )
    say(("weights: ", "dim"), f"logits of {len(some)} prompts differ from the run-time ablation by at most {off:.2g}")
    wrote(save_checkpoint(baked, folder))
