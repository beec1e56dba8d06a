"""The options that several verbs share, and what they turn into: a model, a contrast, sites."""

from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_probe.core.errors import ConfigError, unknown

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.records import Columns
    from subspace_probe.core.sites import Site
    from subspace_probe.models.hooked import HookedModel

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
FILES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")

LOADING = "Loading the model"
PROMPTS = "Prompts"

ModelName = Annotated[
    str, typer.Option("--model", "-m", help="organism:chat, a folder with config.json, or a Hugging Face id.")
]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.", rich_help_panel=LOADING)]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.", rich_help_panel=LOADING)]
Backend = Annotated[str, typer.Option(help="What runs the passes.", rich_help_panel=LOADING)]
Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="Chat template option, as enable_thinking=false. Repeatable.", rich_help_panel=LOADING
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BEHAVIOUR=WORD,...",
        help="Words that the model answers with, as refusal=Sorry,I or harmful=Yes. Repeatable.",
        rich_help_panel=LOADING,
    ),
]
CONTRAST_HELP = "A .jsonl or .csv file with prompt and label, organism:chat/requests, or a Hugging Face dataset."
ContrastName = Annotated[str, typer.Option("--contrast", "-c", help=CONTRAST_HELP, rich_help_panel=PROMPTS)]
MaybeContrast = Annotated[str | None, typer.Option("--contrast", "-c", help=CONTRAST_HELP, rich_help_panel=PROMPTS)]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN,...",
        help="Which column means what, as prompt=question,label=is_bad,positive=yes.",
        rich_help_panel=PROMPTS,
    ),
]
Split = Annotated[
    str | None, typer.Option(help="Part of a dataset or of an organism's prompts.", rich_help_panel=PROMPTS)
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting. Repeatable.")]
Seed = Annotated[int, typer.Option(help="Of every draw: splits, permutations, random directions.", min=0)]


PROGRESS: ContextVar[bool] = ContextVar("progress", default=True)
"""Whether long work shows its bars; set by the global flags."""


def pairs_of(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dictionary.

    Raises:
        ConfigError: an entry without "=", or without a name.
    """
    found: dict[str, str] = {}
    for entry in given or ():
        key, equals, value = entry.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option} {entry!r} was given. Write it as name=value.")
        found[key.strip()] = value
    return found


def open_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    backend: str = "native",
    template: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> "HookedModel":
    """Load a model as the options say.

    Raises:
        UnknownName, ConfigError: a dtype, device or backend that is not there.
        StoreError, BackendError: a model that cannot be loaded.
    """
    import json

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    options: dict[str, Any] = pairs_of(template, "--template")
    for key, value in options.items():
        with suppress(json.JSONDecodeError):  # else it stays a plain word
            options[key] = json.loads(value)
    said = {key: tuple(filter(None, value.split(","))) for key, value in pairs_of(words, "--words").items()}
    if empty := [key for key, listed in said.items() if not listed]:
        raise ConfigError(f"--words {empty[0]}= names no words. Write for instance --words {empty[0]}=Sorry,I.")
    if device is not None:
        _require_device(device)

    from transformers.utils import logging

    import subspace_probe as sp

    if not PROGRESS.get() or name.startswith("organism:"):
        logging.disable_progress_bar()
    return sp.load_model(
        name, device=device, dtype=dtype, backend=backend, template_kwargs=options or None, words=said or None
    )


def _require_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"Device {device!r} cannot be used: {first} Leave --device out to run on the CPU.") from None


def open_contrast(name: str, *, columns: str | None = None, split: str | None = None, seed: int = 0) -> "Contrast":
    """Load prompts as the options say.

    Raises:
        UnknownName, ConfigError: options that do not go with this kind of contrast.
        StoreError, DataError: a file that cannot be read, malformed rows, a class without prompts.
    """
    import subspace_probe as sp

    organism = name.startswith("organism:")
    given: dict[str, Any] = {}
    if columns is not None:
        if organism:
            raise ConfigError(f"--columns was given, but {name!r} has its own. Leave it out.")
        given["columns"] = columns_of(columns)
    if split is not None:
        if Path(name).suffix.lower() in FILES:
            raise ConfigError(f"--split {split} was given, but {name!r} is one file. Leave it out.")
        given["split"] = split
    if organism:
        given["seed"] = seed
    contrast = sp.load_contrast(name, **given)
    contrast.require_both_classes()
    return contrast


def columns_of(text: str | None) -> "Columns":
    """`prompt=question,label=is_bad` as columns; the usual ones where nothing was said.

    Raises:
        UnknownName: a role that there is not.
        ConfigError: an entry without "=".
    """
    from subspace_probe.core.records import Columns

    roles = pairs_of(text.split(",") if text is not None else (), "--columns")
    known = [field.name for field in fields(Columns)]
    for role in roles:
        if role not in known:
            raise unknown("role in --columns", role, known)
    return Columns(**roles)


def sites_of(text: str, n_layers: int) -> "list[Site]":
    """`resid_post` (every layer), `L3.resid_post`, or several with commas, as sites of a model.

    Raises:
        UnknownName, SiteError: a stream or layer that does not exist.
    """
    from subspace_probe.core.sites import resolve_sites

    return list(resolve_sites([part.strip() for part in text.split(",")], n_layers))
