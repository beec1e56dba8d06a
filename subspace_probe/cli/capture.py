"""`subspace-probe capture`: activations of a contrast, into a folder."""

from pathlib import Path
from typing import Annotated

import typer

from subspace_probe.cli.options import (
    DTYPES,
    PROGRESS,
    Backend,
    ColumnNames,
    ContrastName,
    Device,
    Dtype,
    ModelName,
    Seed,
    Split,
    Template,
    open_contrast,
    open_model,
    sites_of,
)
from subspace_probe.core.errors import unknown


def capture(
    model: ModelName,
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the activations.")],
    site: Annotated[
        str, typer.Option(help="resid_post for every layer, L3.resid_post for one, several with commas.")
    ] = "resid_post",
    where: Annotated[str, typer.Option(help="t_inst, t_post_inst, last, all, a number, or span:some words.")] = "last",
    columns: ColumnNames = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    keep_as: Annotated[
        str, typer.Option("--keep-as", help=f"Dtype of the activations; one of {', '.join(DTYPES)}.")
    ] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens a batch may have, pads included. Lower it when memory is short.", min=1)
    ] = 8192,
    seed: Seed = 0,
) -> None:
    """Read activations once and keep them on disk. Run again, it goes on where it was interrupted."""
    import torch

    from subspace_probe.cli.outputs import writable_folder
    from subspace_probe.cli.terminal import complain, grid, right, say, wrote
    from subspace_probe.core.tokens import Where
    from subspace_probe.store import Folder

    if keep_as not in DTYPES:
        raise unknown("dtype", keep_as, DTYPES)
    kept = None if keep_as == "auto" else getattr(torch, keep_as)
    writable_folder(out)
    tokens = Where.parse(where)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    progress = PROGRESS.get()
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template)
    sites = sites_of(site, loaded.spec.n_layers)
    try:
        acts = loaded.capture(
            prompts,
            sites=sites,
            where=tokens,
            into=Folder(out),
            dtype=kept,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    except KeyboardInterrupt:
        complain("interrupted; whole shards are kept. Run the same command again to go on.")
        raise typer.Exit(130) from None
    say((f"{acts.rows.n} rows", "bold"), f" at {tokens} of {len(prompts)} prompts from {prompts.name}")
    rows: list[list[str]] = []
    for each in acts.sites:
        total, dtype = 0.0, ""
        for states, _ in acts.batches(each):  # there may be more than fits into memory
            total, dtype = total + float(states.float().norm(dim=1).sum()), str(states.dtype)[6:]
        rows.append([each.short, f"{acts.rows.n} x {acts.rows.width(each)}", dtype, f"{total / acts.rows.n:.3g}"])
    grid(["site", right("shape"), right("dtype"), right("mean norm")], rows)
    wrote(out)
