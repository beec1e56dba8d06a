"""`subspace-probe patch`: exchange states within pairs of prompts, and see how much of their difference follows."""

from pathlib import Path
from typing import Annotated

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
from subspace_probe.core.errors import unknown

MODES = ("denoise", "noise")
ALIGNMENTS = ("start", "end", "repeat")

MetricName = Annotated[str, typer.Option(help="logit_difference, refusal_score, accuracy, ...")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and report.html.")]
Foreign = Annotated[
    bool, typer.Option("--allow-model-mismatch", help="Use a direction that was found in another model.")
]


def patch(
    model: ModelName,
    contrast: ContrastName,
    site: Annotated[str, typer.Option(help="L3.resid_post, L2.z.h1, or several with commas, patched together.")],
    where: Annotated[str, typer.Option(help="Tokens that are patched: last, t_inst, all, ...")] = "last",
    source_where: Annotated[
        str | None, typer.Option(help="Tokens the states are taken from; default is the same.")
    ] = None,
    direction: Annotated[
        Path | None, typer.Option("--direction", "-d", help="Exchange the component along it alone: a file of find.")
    ] = None,
    outside: Annotated[bool, typer.Option("--outside", help="Exchange everything but that component.")] = False,
    align: Annotated[
        str | None,
        typer.Option(help=f"Where sides have several tokens, in different numbers: {', '.join(ALIGNMENTS)}."),
    ] = None,
    mode: Annotated[str, typer.Option(help="denoise: label 1 into label 0; noise: the reverse.")] = "denoise",
    metric: MetricName = "logit_difference",
    random: Annotated[int, typer.Option(help="Draws of the control behind the verdict, which takes 39.", min=0)] = 40,
    columns: ColumnNames = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="At most so many pairs.", min=2, rich_help_panel=PROMPTS)] = None,
    out: Out = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    words: Words = None,
    seed: Seed = 0,
) -> None:
    """Put states of one side of each pair into the other: what share of the difference do they carry?

    The control: for a direction, random ones; for whole states, those of other prompts of the same side.
    """
    from dataclasses import replace
    from time import perf_counter

    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import say, show_report, wrote
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where
    from subspace_probe.diagnostics.patching import measure_patch

    start = perf_counter()
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if align is not None and align not in ALIGNMENTS:
        raise unknown("alignment", align, ALIGNMENTS)
    if out is not None:
        writable_folder(out)
    tokens, taken = Where.parse(where), None if source_where is None else Where.parse(source_where)
    subspace = None if direction is None else Subspace.load(direction)
    if subspace is not None and allow_model_mismatch:
        subspace = subspace.for_any_model()
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    prompts = prompts if limit is None else prompts.first_pairs(limit)
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)
    report = measure_patch(
        loaded,
        prompts,
        sites_of(site, loaded.spec.n_layers),
        metric,
        where=tokens,
        source_where=taken,
        subspace=subspace,
        outside=outside,
        align=align,  # pyright: ignore[reportArgumentType]  (checked above)
        mode=mode,  # pyright: ignore[reportArgumentType]
        draws=random,
        seed=seed,
        progress=PROGRESS.get(),
    )
    report = replace(report, provenance=replace(report.provenance, seconds=perf_counter() - start))
    show_report(report)
    say((report.findings[-1].note, ""))
    if out is not None:
        wrote(*save_report(report, out))
