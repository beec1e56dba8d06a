"""Contrasts from Hugging Face datasets, by hub name or local path."""

from pathlib import Path
from typing import Any

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import StoreError
from subspace_probe.core.records import Columns, Record


def from_dataset(name: str, *, columns: Columns | None = None, split: str = "train", **kwargs: Any) -> Contrast:
    """Load a dataset and read it as a contrast.

    Args:
        name: a hub name, a folder that `datasets` can load, or one written by `save_to_disk`.
        columns: which column means what.
        split: which part.
        kwargs: passed to `datasets.load_dataset` (`name`, `revision`, ...).

    Raises:
        StoreError: it cannot be loaded.
        DataError: malformed rows, by row number.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    folder = Path(name)
    saved = folder.is_dir() and any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json"))
    try:
        loaded: Any = load_from_disk(name) if saved else load_dataset(name, split=split, **kwargs)
        data = loaded[split] if isinstance(loaded, DatasetDict) else loaded
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise StoreError(
            f"Cannot load {name!r}: {first} Give a .jsonl or .csv file, or a dataset with a split {split!r}."
        ) from None
    records = (Record(f"{name}[{split}]:{row}", dict(values)) for row, values in enumerate(data))
    return Contrast.from_records(records, name=name, columns=columns)
