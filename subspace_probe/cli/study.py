"""`subspace-probe study`: a published question, asked of any model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_probe.cli.options import (
    PROGRESS,
    Backend,
    ColumnNames,
    Device,
    Dtype,
    MaybeContrast,
    Seed,
    Settings,
    Split,
    Template,
    Words,
    open_contrast,
    open_model,
    pairs_of,
)
from subspace_probe.core.errors import ConfigError, unknown

if TYPE_CHECKING:
    from subspace_probe.studies.study import Study


def study(
    name: Annotated[str | None, typer.Argument(help="Which study; without it, the studies are listed.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="organism:chat, a folder with config.json, or a hub id.")
    ] = None,
    contrast: MaybeContrast = None,
    columns: ColumnNames = None,
    split: Split = None,
    settings: Settings = None,
    preset: Annotated[
        str | None, typer.Option(help="A group of settings, under --set. Default: tiny for organisms.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report. Default: NAME-report.")
    ] = None,
    words: Words = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
    listed: Annotated[bool, typer.Option("--list", help="List the studies, or the settings of one.")] = False,
) -> None:
    """Run a study and write its report. Without a name: list the studies; NAME --list: its settings."""
    from subspace_probe.studies import STUDIES

    if name is None:
        _list_studies()
        return
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    if listed:
        _list_settings(name)
        return
    if model is None:
        raise ConfigError(f"No model was given for {name}. Add --model, for instance --model organism:chat.")
    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import show_report, wrote

    folder = writable_folder(out or Path(f"{name}-report"))
    given = pairs_of(settings, "--set")
    chosen: Study = STUDIES.load(name)
    if preset is None and model.startswith("organism:") and "tiny" in chosen.presets:
        preset = "tiny"
    config = configured(chosen, name, given, preset=preset, seed=seed)
    prompts = None if contrast is None else open_contrast(contrast, columns=columns, split=split, seed=seed)
    progress = PROGRESS.get()
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template, words=words)
    report = chosen.run(loaded, config, contrast=prompts, progress=progress)
    paths = save_report(report, folder)
    show_report(report)
    wrote(*paths)


def configured(study: "Study", name: str, given: Mapping[str, str], *, preset: str | None, seed: int) -> Any:
    """The settings of a run: the preset's, under what was given.

    Raises:
        UnknownName: no such preset or setting.
        ConfigError: a value of another type.
    """
    from dataclasses import fields

    from subspace_probe.cli.settings import parse_settings

    if preset is not None and preset not in study.presets:
        raise unknown(f"preset of {name}", preset, study.presets)
    values = dict(study.presets[preset]) if preset is not None else {}
    if "seed" in [field.name for field in fields(study.Config)]:
        values["seed"] = seed
    return study.Config(**values | parse_settings(study.Config, given, f"setting of {name}"))


def _list_studies() -> None:
    from subspace_probe.cli.terminal import grid, say
    from subspace_probe.studies import STUDIES

    loaded: dict[str, Study] = {name: STUDIES.load(name) for name in STUDIES}
    grid(
        ["study", "asks", "presets", "after"],
        [[name, study.title, ", ".join(study.presets), study.citation] for name, study in loaded.items()],
    )
    say(
        ("Run one with ", "dim"),
        "subspace-probe study NAME --model MODEL",
        (", see its settings with ", "dim"),
        "--list",
    )


def _list_settings(name: str) -> None:
    from rich.table import Column

    from subspace_probe.cli.settings import describe_settings
    from subspace_probe.cli.terminal import grid, plain, say
    from subspace_probe.studies import STUDIES

    chosen: Study = STUDIES.load(name)
    say((chosen.title, "bold"), (f"  {chosen.citation}", "dim"))
    head = [Column("--set", no_wrap=True), Column("takes", no_wrap=True), Column("default", max_width=30), ""]
    grid(head, describe_settings(chosen.Config))
    for preset, values in chosen.presets.items():
        say(("preset ", "dim"), preset, (": " + plain(", ".join(f"{k}={v}" for k, v in values.items())), "dim"))
