"""What the verbs of `subspace-probe guard` share: the options, and how a guard and prompts of one class are opened."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli.options import FILES, LOADING, PROMPTS, columns_of, open_contrast, open_model
from subspace_probe.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel

GuardFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that guard fit wrote.")]
OwnModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Where its model is now. Default: as recorded.", rich_help_panel=LOADING),
]
Foreign = Annotated[
    bool,
    typer.Option(
        "--allow-model-mismatch",
        help="Use it on other weights than it was made for, as after fine-tuning.",
        rich_help_panel=LOADING,
    ),
]
Negatives = Annotated[
    str | None,
    typer.Option(
        help="Benign prompts that nothing else has seen: a file without labels, or a contrast's negatives.",
        rich_help_panel=PROMPTS,
    ),
]
TargetFpr = Annotated[float, typer.Option(help="Share of negatives that may be flagged.")]
Confidence = Annotated[str, typer.Option(help="With which the share is at most that; none: it is so on average.")]


def open_guard(
    folder: Path,
    model: "str | HookedModel | None",
    *,
    device: str | None = None,
    dtype: str = "auto",
    backend: str = "native",
    template: "Sequence[str] | None" = None,
    allow_model_mismatch: bool = False,
) -> "LatentGuard":
    """Load a guard, and its model where that was not done.

    Raises:
        StoreError: no such guard, or its model is not where it was.
        StaleStore: made for another model.
    """
    from subspace_probe.guard.artifact import describe_saved
    from subspace_probe.guard.guard import LatentGuard

    described = describe_saved(folder)
    if model is None:
        try:
            model = open_model(described["model"], device=device, dtype=dtype, backend=backend, template=template)
        except StoreError as error:
            raise StoreError(
                f"{error} The guard {str(folder)!r} was made for it: say where it is now with --model."
            ) from None
    elif isinstance(model, str):
        model = open_model(model, device=device, dtype=dtype, backend=backend, template=template)
    return LatentGuard.load(folder, model, allow_model_mismatch=allow_model_mismatch)


def open_negatives(name: str, *, columns: str | None = None, seed: int = 0) -> "Contrast":
    """Benign prompts: the rows of a file, which needs no labels, or the negatives of a contrast by name.

    Raises:
        StoreError, DataError: a file that cannot be read, or one with positives in it.
    """
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.records import read_csv, read_jsonl

    path = Path(name)
    if path.suffix.lower() not in FILES:
        return open_contrast(name, columns=columns, seed=seed).where(label=0)
    rows = read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else read_jsonl(path)
    return Contrast.from_records(rows, name=path.stem, columns=columns_of(columns), label=0)


def confidence_of(text: str) -> float | None:
    """A confidence, or None for a rate that is to hold on average.

    Raises:
        ConfigError: something else.
    """
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--confidence {text} was given. Give a number such as 0.95, or none.") from None
