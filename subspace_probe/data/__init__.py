"""Prompts from files and from Hugging Face datasets."""

from pathlib import Path
from typing import Any

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import StoreError
from subspace_probe.core.records import Columns


def load_contrast(name: str, *, columns: Columns | None = None, **kwargs: Any) -> Contrast:
    """Load a contrast from a file or a dataset.

    Args:
        name: a `.jsonl` or `.csv` file; else a Hugging Face dataset, by hub name or local path.
        columns: which column means what, where they are not called `prompt`, `label` and `pair`.
        kwargs: for datasets: `split` (default "train") and whatever `datasets.load_dataset` takes.

    Raises:
        StoreError: no such file or dataset.
        DataError: malformed rows.
    """
    suffix = Path(name).suffix.lower()
    if suffix in (".jsonl", ".json", ".ndjson"):
        return Contrast.from_jsonl(name, columns=columns)
    if suffix in (".csv", ".tsv"):
        return Contrast.from_csv(name, columns=columns)
    if Path(name).is_file():
        raise StoreError(f"{name!r} is neither .jsonl nor .csv. Convert it, or load it as a Hugging Face dataset.")
    from subspace_probe.data.datasets_hub import from_dataset

    return from_dataset(name, columns=columns, **kwargs)
