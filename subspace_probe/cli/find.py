"""`subspace-probe find`: from prompts with labels to a direction in a file."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_probe.cli.options import (
    PROGRESS,
    Backend,
    ColumnNames,
    ContrastName,
    Device,
    Dtype,
    ModelName,
    Seed,
    Settings,
    Split,
    Template,
    open_contrast,
    open_model,
    pairs_of,
    sites_of,
)

if TYPE_CHECKING:
    from subspace_probe.finders.sweep import Found


def find(
    model: ModelName,
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the direction.")] = Path("direction.safetensors"),
    finder: Annotated[str, typer.Option(help="How to find it.")] = "mean_difference",
    site: Annotated[
        str, typer.Option(help="resid_post tries every layer; L3.resid_post is one; several with commas.")
    ] = "resid_post",
    where: Annotated[str, typer.Option(help="t_inst, t_post_inst, last, a number, or span:some words.")] = "last",
    settings: Settings = None,
    columns: ColumnNames = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Find the direction that separates the two classes. The site is chosen on validation prompts, judged on others."""
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.core.tokens import Where

    writable_file(out)
    tokens = Where.parse(where)
    method = _finder(finder, pairs_of(settings, "--set"), seed)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    progress = PROGRESS.get()
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template)
    sites = sites_of(site, loaded.spec.n_layers)

    from subspace_probe.finders.sweep import find as sweep

    acts = loaded.capture(prompts, sites=sites, where=tokens, progress=progress)
    found = sweep(acts, method, seed=seed, progress=progress)
    found.subspace.save(out)
    _show(found, model, out)


def _finder(name: str, given: dict[str, str], seed: int) -> Any:
    """The finder with its settings; its own seed is the command's unless it was set."""
    from subspace_probe.cli.settings import parse_settings
    from subspace_probe.finders import FINDERS

    kind = FINDERS.load(name)
    values = parse_settings(kind, given, f"setting of {name}")
    if "seed" in [field.name for field in fields(kind)]:
        values = {"seed": seed} | values
    return kind(**values)


def _show(found: "Found", model: str, out: Path) -> None:
    from rich.text import Text

    from subspace_probe.cli.terminal import grid, right, say, warn, wrote

    subspace = found.subspace
    rows = found.table.records()
    grid(
        ["site", right("validation AUROC"), right("d'"), ""],
        [
            [
                row["site"],
                f"{row['auroc']:.3f}",
                f"{row['d_prime']:.2f}",
                Text("chosen", style="bold green" if subspace.found else "yellow") if row["chosen"] else "",
            ]
            for row in rows
        ],
    )
    notes = subspace.notes
    place = subspace.site.short if subspace.site else "?"
    tried = f"the best of {notes['sites_tried']} sites, corrected" if notes["sites_tried"] > 1 else "one site"
    numbers = f"AUROC {notes['test_auroc']:.3f} on test prompts, p = {notes['p_of_the_best']:.2g} ({tried})"
    if subspace.found:
        say(("found", "bold green"), f" at {place}, {subspace.where}: {numbers}")
    else:
        warn(f"NOT FOUND: nothing beyond what shuffled labels give. At best {place}, {subspace.where}: {numbers}")
        warn("The file is written and marked found=False. Do not read it as a finding: add prompts or try other sites.")
    wrote(out)
    if subspace.found:
        command = shlex.join(
            ["subspace-probe", "steer", "--model", model, "--direction", str(out), "--strength", "1,2"]
        )
        say(("Use it: ", "dim"), command, " --prompt '...'")
