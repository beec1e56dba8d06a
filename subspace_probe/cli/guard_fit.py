"""`subspace-probe guard fit`, `threshold`: from prompts with labels to a guard in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from subspace_probe.cli.guard_options import (
    Confidence,
    Foreign,
    GuardFolder,
    Negatives,
    OwnModel,
    TargetFpr,
    confidence_of,
    open_guard,
    open_negatives,
)
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
    open_contrast,
    open_model,
)
from subspace_probe.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.parts import Parts

Where = Annotated[
    str | None, typer.Option(help="t_inst, last, all (the mean), ... Default: t_inst, or what the model has.")
]


def fit(
    model: ModelName,
    contrast: ContrastName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the guard.")] = Path("guard"),
    method: Annotated[
        str, typer.Option(help="lda, logistic, mean_difference, centroid_cosine (as published) or factor.")
    ] = "lda",
    layers: Annotated[
        str, typer.Option(help="auto (by cross-validation on what it is fitted on), or numbers as 12,13.")
    ] = "auto",
    where: Where = None,
    stream: Annotated[str, typer.Option(help="What is read.")] = "resid_post",
    gate: Annotated[bool, typer.Option("--gate", help="Abstain on states unlike the benign ones.")] = False,
    nuisance: Annotated[
        str | None, typer.Option(help="A column that the guard must not read, as refused; for centroid_cosine, factor.")
    ] = None,
    calibrate: Annotated[str, typer.Option(help="sigmoid, isotonic, temperature or none.")] = "sigmoid",
    negatives: Negatives = None,
    target_fpr: TargetFpr = 0.01,
    confidence: Confidence = "0.95",
    no_threshold: Annotated[
        bool, typer.Option("--no-threshold", help="Write a guard that promises no rate of false positives.")
    ] = False,
    shares: Annotated[
        str,
        typer.Option(
            help="Of the prompts to fit, calibrate and set the threshold on. A use without need gets none.",
            rich_help_panel=PROMPTS,
        ),
    ] = "0.5,0.2,0.3",
    category: Annotated[str, typer.Option(help="What it looks for, as its answers call it.")] = "harmful",
    columns: ColumnNames = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Fit a guard, calibrate it and set its threshold, each on prompts of its own, split by group.

    The threshold rests on negatives: those of --negatives, or of the third part of the contrast. Where they are too few
    for the rate that is asked for, nothing is written, and it says how many are needed.
    """
    from subspace_probe.cli.outputs import writable_folder
    from subspace_probe.cli.terminal import wrote
    from subspace_probe.core.sites import Site
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.methods import METHODS
    from subspace_probe.guard.probe import LatentProbe
    from subspace_probe.guard.residual_gate import ResidualGate

    if no_threshold and negatives is not None:
        raise ConfigError("Both --negatives and --no-threshold were given. Leave one of them out.")
    METHODS.load(method)  # an unknown name ends here
    Site.parse(f"L0.{stream}")  # and here
    writable_folder(out)
    sure = confidence_of(confidence)
    prompts = open_contrast(contrast, columns=columns, split=split, seed=seed)
    given = None if negatives is None else open_negatives(negatives, columns=columns, seed=seed)
    uses = (True, calibrate != "none", given is None and not no_threshold)
    parts = _parts(prompts, shares, uses, seed)
    benign = given if parts.threshold is None else parts.threshold.where(label=0)
    if benign is not None:
        _require_enough(benign, target_fpr, sure)
    loaded = open_model(model, device=device, dtype=dtype, backend=backend, template=template)
    made = LatentGuard(
        loaded, LatentProbe(method, random_state=seed), stream=stream, layers=_layers(layers), where=where,
        gate=ResidualGate(random_state=seed) if gate else None, category=category, seed=seed,
    )  # fmt: skip
    made.fit(parts.fit, nuisance=nuisance, progress=PROGRESS.get())
    if parts.calibrate is not None:
        made.calibrate(parts.calibrate, method=calibrate)
    if benign is not None:
        made.set_threshold(benign, target_fpr=target_fpr, confidence=sure)
    made.save(out)
    _show(made, {"fit": parts.fit, "calibrate": parts.calibrate, "threshold": benign})
    _say_what_holds(made, parts.threshold)
    wrote(out / "guard.json", out / "guard.safetensors")


def threshold(
    folder: GuardFolder,
    negatives: Annotated[
        str, typer.Option(help="Benign prompts that nothing else has seen: a file without labels.", metavar="FILE")
    ],
    target_fpr: TargetFpr = 0.01,
    confidence: Confidence = "0.95",
    columns: ColumnNames = None,
    model: OwnModel = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
) -> None:
    """Set the threshold of a guard anew, on negatives of the traffic that it is to see. What was fitted stays."""
    from subspace_probe.cli.outputs import writable_folder
    from subspace_probe.cli.terminal import wrote

    writable_folder(folder)
    sure = confidence_of(confidence)
    benign = open_negatives(negatives, columns=columns)
    _require_enough(benign, target_fpr, sure)
    made = open_guard(
        folder, model, device=device, dtype=dtype, backend=backend, template=template,
        allow_model_mismatch=allow_model_mismatch,
    )  # fmt: skip
    made.set_threshold(benign, target_fpr=target_fpr, confidence=sure).save(folder)
    _show(made, {"threshold": benign})
    _say_what_holds(made, None)
    wrote(folder / "guard.json", folder / "guard.safetensors")


def _parts(prompts: "Contrast", shares: str, uses: tuple[bool, ...], seed: int) -> "Parts":
    from subspace_probe.guard.parts import parts_of

    try:
        fitted, calibrated, last = (float(part) for part in shares.split(","))
    except ValueError:
        raise ConfigError(f"--shares {shares} was given. Give three numbers, as 0.5,0.2,0.3.") from None
    first, second, third = (share if use else 0.0 for share, use in zip((fitted, calibrated, last), uses, strict=True))
    return parts_of(prompts, fit=first, calibrate=second, threshold=third, seed=seed)


def _layers(text: str) -> "Literal['auto'] | list[int]":
    if text == "auto":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {text} was given. Give auto, or numbers such as 12,13.") from None


def _require_enough(benign: "Contrast", target_fpr: float, confidence: float | None) -> None:
    """Check before the model runs that a threshold can be set: whatever the scores are, only their number decides."""
    from subspace_probe.guard.examples import examples_of
    from subspace_probe.guard.thresholds import threshold_at

    shown = examples_of(benign)
    groups = shown.groups if shown.grouped else None
    try:
        threshold_at([0.0] * len(benign), target_fpr=target_fpr, confidence=confidence, groups=groups)
    except DataError as error:
        raise DataError(
            f"{error} Negatives of their own come by --negatives FILE; --no-threshold writes a guard that promises no "
            "rate."
        ) from None


def _show(guard: "LatentGuard", parts: "dict[str, Contrast | None]") -> None:
    from subspace_probe.cli.terminal import grid, right
    from subspace_probe.guard.classifier import USES
    from subspace_probe.guard.examples import examples_of

    head = ["", right("prompts"), right("positive"), right("negative"), right("groups")]
    rows: list[list[str]] = []
    for use, part in parts.items():
        if part is None:
            rows.append([f"not {USES[use]}", "0", "", "", ""])
            continue
        positives = sum(part.labels)
        groups = len(set(examples_of(part).groups.tolist()))
        rows.append([USES[use], *map(str, (len(part), positives, len(part) - positives, groups))])
    grid(head, rows)
    head = ["layer", right("AUROC on held-out folds"), right("standard error"), ""]
    rows = []
    for layer, score in guard.layer_scores.items():
        chosen = "chosen" if layer in guard.layers else ""
        rows.append([str(layer), f"{score.auroc:.3f}", f"{score.error:.3f}", chosen])
    if rows:
        grid(head, rows)


def _say_what_holds(guard: "LatentGuard", rest: "Contrast | None") -> None:
    """The promise, and what is none."""
    from subspace_probe.cli.terminal import plain, say, warn
    from subspace_probe.core.tokens import T_INST

    say(plain(repr(guard)))
    if guard.threshold is None:
        warn("No threshold: it flags above the probe's own boundary, and no rate of false positives is promised.")
    elif guard.threshold.confidence is None:
        warn("The rate holds on average over such sets of negatives; for this one it may be higher, up to the bound.")
    marked = 0 if guard.threshold is None else guard.threshold.marked
    if marked and guard.where.anchor == T_INST.anchor:
        warn(
            f"{marked} negatives say which part of the message is the instruction, and it is read at that part's "
            "end. Prompts that come without are read at the end of the message, where the rate is another."
        )
    if guard.calibration is None:
        warn("Not calibrated: its probabilities are the probe's own, and only their order means something.")
    if rest is not None and sum(rest.labels):
        positives = rest.where(label=1)
        found = guard.predict(positives)
        say(f"Of the {len(positives)} positives set aside with these negatives it flags {found.mean():.1%}.")
