"""`subspace-probe sweep`: which layer and token carries a difference? Every one is patched, one at a time."""

from pathlib import Path
from typing import Annotated, Any

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
)
from subspace_probe.cli.patch import MODES, Foreign, MetricName, Out
from subspace_probe.core.errors import ConfigError, unknown


def sweep(
    model: ModelName,
    contrast: ContrastName,
    stream: Annotated[
        str, typer.Option(help="resid_pre, attn_out, mlp_out, z, ...; several with commas.")
    ] = "resid_pre",
    heads: Annotated[bool, typer.Option("--heads", help="Every head of z by itself; needs --stream z.")] = False,
    layers: Annotated[str | None, typer.Option(help="0-3 or 0,2,-1; default is all.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="t_inst,last,-3; default is every token, where prompts are equally long.")
    ] = None,
    direction: Annotated[
        Path | None, typer.Option("--direction", "-d", help="Exchange the component along it alone: a file of find.")
    ] = None,
    mode: Annotated[str, typer.Option(help="denoise: label 1 into label 0; noise: the reverse.")] = "denoise",
    metric: MetricName = "logit_difference",
    attribution: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="How well gradients estimate it: 0 at the base, else averaged over steps.", min=0
        ),
    ] = None,
    skip_equal: Annotated[
        bool, typer.Option("--skip-equal", help="Leave out cells whose two states are equal bit for bit.")
    ] = False,
    columns: ColumnNames = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="At most so many pairs.", min=1, rich_help_panel=PROMPTS)] = None,
    out: Out = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    words: Words = None,
    seed: Seed = 0,
) -> None:
    """Patch every layer and token by itself, and draw what share of the difference each carries."""
    from dataclasses import replace
    from time import perf_counter

    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import show_report, wrote
    from subspace_probe.core.sites import stream as checked
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.attribution import agreement
    from subspace_probe.interventions.attribution import attribution as estimated
    from subspace_probe.interventions.patch_sweep import patch_sweep

    start = perf_counter()
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if out is not None:
        writable_folder(out)
    subspace = None if direction is None else Subspace.load(direction)
    if subspace is not None and allow_model_mismatch:
        subspace = subspace.for_any_model()
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    clean, corrupt = (prompts if limit is None else prompts.first_pairs(limit)).sides()
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)
    cells: dict[str, Any] = {
        "streams": [checked(name.strip()) for name in stream.split(",")],
        "layers": _layers(layers),
        "positions": None if positions is None else [part.strip() for part in positions.split(",")],
        "heads": heads,
        "mode": mode,
        "subspace": subspace,
    }
    progress = PROGRESS.get()
    swept = patch_sweep(loaded, clean, corrupt, metric, skip_equal=skip_equal, progress=progress, seed=seed, **cells)
    report = swept.report()
    if attribution is not None:
        guess = estimated(loaded, clean, corrupt, metric, integrated=attribution, progress=progress, **cells)
        report += agreement(swept, guess).findings()
    report = replace(report, provenance=replace(report.provenance, seconds=perf_counter() - start))
    show_report(report)
    if out is not None:
        wrote(*save_report(report, out))


def _layers(text: str | None) -> list[int] | None:
    """`0-3,5` as numbers."""
    if text is None:
        return None
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-") if not part.strip().startswith("-") else (part, "", "")
            found += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ConfigError(f"--layers {text!r} was given. Write for instance 0-3 or 0,2,-1.") from None
    return found
