"""`subspace-probe find`: from prompts with labels to a direction in a file."""

import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Words,
    open_contrast,
    open_model,
    pairs_of,
    sites_of,
)
from subspace_probe.core.errors import ConfigError, unknown

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Table
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import Where
    from subspace_probe.finders.sweep import Found
    from subspace_probe.models.hooked import HookedModel


def find(
    model: ModelName,
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the direction.")] = Path("direction.safetensors"),
    finder: Annotated[str, typer.Option(help="How to find it; several with commas.")] = "mean_difference",
    site: Annotated[
        str, typer.Option(help="resid_post tries every layer; L3.resid_post is one; several with commas.")
    ] = "resid_post",
    where: Annotated[
        str, typer.Option(help="t_inst, t_post_inst, last, a number, or span:some words; several with commas.")
    ] = "last",
    settings: Settings = None,
    select: Annotated[
        Literal["auroc", "published"],
        typer.Option(help="published: the rule of Arditi et al. 2024, which looks for a refusal direction itself."),
    ] = "auroc",
    other: Annotated[str | None, typer.Option(help="The second checkpoint, for weight_delta.")] = None,
    columns: ColumnNames = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    words: Words = None,
    seed: Seed = 0,
) -> None:
    """Find the direction that separates the two classes. Validation prompts choose the site, others judge it."""
    from subspace_probe.cli.outputs import writable_file
    from subspace_probe.finders import FINDERS, MODEL_FINDERS

    writable_file(out)
    names = [name.strip() for name in finder.split(",")]
    for name in names:
        if name not in FINDERS and name not in MODEL_FINDERS:
            raise unknown("finder", name, [*FINDERS, *MODEL_FINDERS])
    trained = [name for name in names if name in MODEL_FINDERS]
    given = pairs_of(settings, "--set")
    if len(names) > 1 and (trained or given):
        what = f"{trained[0]} runs the model itself" if trained else "--set is for one finder"
        raise ConfigError(f"Several finders were given, but {what}. Run it by itself.")
    if other is not None and trained != ["weight_delta"]:
        raise ConfigError("--other was given, which only --finder weight_delta takes. Leave it out.")
    methods = [] if select == "published" else [_finder(name, given, seed, other) for name in names]
    places = _positions(where)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)
    sites = sites_of(site, loaded.spec.n_layers)
    if select == "published":
        _published(loaded, prompts, seed, out)
    elif trained:
        if len(sites) != 1 or len(places) != 1:
            raise ConfigError(
                f"{names[0]} runs the model at one site and position, but {len(sites)} sites and {len(places)} "
                "positions were given. Choose one of each, for instance --site L3.resid_post --where last."
            )
        subspace = methods[0].fit(loaded, prompts, sites[0], places[0], progress=PROGRESS.get())
        subspace.save(out)
        _show_one(subspace)
        _say_how_to_use(subspace, model, out)
    else:
        from subspace_probe.finders.sweep import find as sweep

        shown = PROGRESS.get()
        acts = [loaded.capture(prompts, sites=sites, where=place, progress=shown) for place in places]
        found = sweep(acts, methods, seed=seed, progress=shown)
        found.subspace.save(out)
        _show(found)
        _say_how_to_use(found.subspace, model, out)


def _positions(text: str) -> "list[Where]":
    from subspace_probe.core.tokens import Where

    parts = [text] if text.startswith("span:") else text.split(",")
    return [Where.parse(part.strip()) for part in parts]


def _finder(name: str, given: dict[str, str], seed: int, other: str | None) -> Any:
    """The finder with its settings; its own seed is the command's unless it was set."""
    from subspace_probe.cli.settings import parse_settings
    from subspace_probe.finders import FINDERS, MODEL_FINDERS

    kind = (FINDERS if name in FINDERS else MODEL_FINDERS).load(name)
    values = parse_settings(kind, given, f"setting of {name}")
    if "seed" in [field.name for field in fields(kind)]:
        values = {"seed": seed} | values
    if other is not None:
        values["other"] = open_model(other)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        how = "--other DIR" if missing == ["other"] else " ".join(f"--set {name}=..." for name in missing)
        raise ConfigError(f"{name} needs {', '.join(missing)}. Give {how}.")
    return kind(**values)


def _published(model: "HookedModel", prompts: "Contrast", seed: int, out: Path) -> None:
    from subspace_probe.finders.published_selection import find_published
    from subspace_probe.metrics.behaviour import refusal_score

    train, rest = prompts.split(0.5, seed=seed)
    pick, table = find_published(model, train, rest, refusal_score(model), progress=PROGRESS.get())
    _show_candidates(table)
    if pick is None:
        raise ConfigError(
            "No candidate survives the published filters on layer, KL and induce score. The model may not refuse "
            "through one direction, or the prompts may not make it refuse."
        )
    pick.save(out)
    _say_how_to_use(pick, model.spec.name, out)


def _show_candidates(table: "Table") -> None:
    from subspace_probe.cli.terminal import grid, right

    rows = sorted(table.records(), key=lambda row: (not row["chosen"], not row["kept"], row["bypass"]))
    grid(
        [right("position"), right("layer"), right("bypass"), right("induce"), right("KL"), ""],
        [
            [
                str(row["position"]),
                str(row["layer"]),
                *(f"{row[name]:.3f}" for name in ("bypass", "induce", "kl")),
                "chosen" if row["chosen"] else "" if row["kept"] else "filtered out",
            ]
            for row in rows[:12]
        ],
    )


def _show_one(subspace: "Subspace") -> None:
    """What the model finder says of its result: the numbers of its notes."""
    from subspace_probe.cli.terminal import grid, right, say, warn

    rows: list[list[Any]] = []
    for name, value in subspace.notes.items():
        if isinstance(value, dict) and "low" in value:
            rows.append([name, f"{value['estimate']:.3f}", f"[{value['low']:.3f}, {value['high']:.3f}]"])
        elif isinstance(value, float):
            rows.append([name, f"{value:.4g}", ""])
    grid(["", right("value"), right("95 % interval")], rows)
    place = f"{subspace.site.short if subspace.site else '?'}, {subspace.where}, rank {subspace.rank}"
    if subspace.found:
        say(("found", "bold green"), f" at {place}")
    else:
        warn(f"NOT FOUND at {place}: nothing beyond the controls above.")


def _show(found: "Found") -> None:
    from rich.text import Text

    from subspace_probe.cli.terminal import grid, right, say, warn

    subspace = found.subspace
    rows = found.table.records()
    several = [name for name in ("position", "finder") if len({row[name] for row in rows}) > 1]
    grid(
        ["site", *several, right("validation AUROC"), right("d'"), ""],
        [
            [
                row["site"],
                *(row[name] for name in several),
                f"{row['auroc']:.3f}",
                f"{row['d_prime']:.2f}",
                Text("chosen", style="bold green" if subspace.found else "yellow") if row["chosen"] else "",
            ]
            for row in rows
        ],
    )
    notes = subspace.notes
    place = subspace.site.short if subspace.site else "?"
    tried = f"the best of {notes['sites_tried']}, corrected" if notes["sites_tried"] > 1 else "one site"
    numbers = f"AUROC {notes['test_auroc']:.3f} on test prompts, p = {notes['p_of_the_best']:.2g} ({tried})"
    if subspace.found:
        say(("found", "bold green"), f" at {place}, {subspace.where}: {numbers}")
    else:
        warn(f"NOT FOUND: nothing beyond what shuffled labels give. At best {place}, {subspace.where}: {numbers}")


def _say_how_to_use(subspace: "Subspace", model: str, out: Path) -> None:
    from subspace_probe.cli.terminal import say, warn, wrote
    from subspace_probe.core.subspaces import ACTIVATION

    if not subspace.found:
        warn("The file is written and marked found=False. Do not read it as a finding: add prompts or try other sites.")
    wrote(out)
    if subspace.found and subspace.scale_unit == ACTIVATION and subspace.reader is None:
        command = shlex.join(
            ["subspace-probe", "steer", "--model", model, "--direction", str(out), "--strength", "1,2"]
        )
        say(("Use it: ", "dim"), command, " --prompt '...'")
