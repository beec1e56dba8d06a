"""`subspace-probe study`: a published question, asked of any model."""

from collections.abc import Iterable, Mapping
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
    seeds: Annotated[int, typer.Option(help="How many seeds, counted up from --seed.", min=1)] = 1,
    listed: Annotated[bool, typer.Option("--list", help="List the studies, or the settings of one.")] = False,
) -> None:
    """Run a study and write its report. Without a name: list the studies; NAME --list: its settings.

    The report is written whatever comes out; the exit code is 1 where something is not as the study expects it. With
    several seeds, or several organisms of the preset tiny, each run gets a folder of its own, and the report over all
    of them stands beside these.
    """
    from subspace_probe.studies import STUDIES

    if name is None:
        _list_studies()
        return
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    if listed:
        _list_settings(name)
        return
    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.terminal import say, show_report, wrote
    from subspace_probe.studies.over_seeds import Run, over_seeds

    chosen: Study = STUDIES.load(name)
    given = pairs_of(settings, "--set")
    if "seed" in given:
        raise ConfigError(
            f"--set seed={given['seed']} was given, which every run would share. Use --seed for the first."
        )
    planned = _planned(chosen, name, model, preset, range(seed, seed + seeds))
    configs = [configured(chosen, name, given, preset=preset, seed=which, model=on) for _, on, which in planned]
    folder = writable_folder(out or Path(f"{name}-report"))
    runs: list[Run] = []
    for (case, on, which), config in zip(planned, configs, strict=True):
        if len(planned) > 1:
            say((f"{case or name}, seed {which}: ", "dim"), on)
        prompts = None if contrast is None else open_contrast(contrast, columns=columns, split=split, seed=which)
        loaded = open_model(on, device=device, dtype=dtype, backend=backend, template=template, words=words)
        runs.append(Run(case, which, chosen.run(loaded, config, contrast=prompts, progress=PROGRESS.get())))
        if len(planned) > 1:  # each as it is finished: the next may take hours
            save_report(runs[-1].report, folder / runs[-1].folder)
    report = over_seeds(runs) if len(runs) > 1 else runs[0].report
    paths = save_report(report, folder)
    show_report(report)
    wrote(*paths)
    if report.failures():
        raise typer.Exit(1)


def _planned(
    study: "Study", name: str, model: str | None, preset: str | None, seeds: Iterable[int]
) -> list[tuple[str, str, int]]:
    """Which case runs on which model with which seed.

    Raises:
        ConfigError: no model was given, and the preset is not the one that brings its own.
    """
    if model is not None:
        return [("", model, seed) for seed in seeds]
    if preset != "tiny" or not study.organisms:
        own = ", or --preset tiny, which runs on the bundled organisms" if study.organisms else ""
        raise ConfigError(f"No model was given for {name}. Add --model, for instance --model organism:chat{own}.")
    return [
        (case, f"organism:{names[seed % len(names)]}", seed)
        for case, names in study.organisms.items()
        for seed in seeds
    ]


def configured(
    study: "Study", name: str, given: Mapping[str, str], *, preset: str | None, seed: int, model: str = ""
) -> Any:
    """The settings of a run: the preset's, under what was given. An organism's preset is `tiny` unless one is named.

    Raises:
        UnknownName: no such preset or setting.
        ConfigError: a value of another type.
    """
    from dataclasses import fields

    from subspace_probe.cli.settings import parse_settings

    if preset is None and model.startswith("organism:") and "tiny" in study.presets:
        preset = "tiny"
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
