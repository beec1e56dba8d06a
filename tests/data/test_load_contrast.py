"""The user's own prompts: files by suffix, and Hugging Face datasets by local path."""

import json
from pathlib import Path

import pytest

ROWS = [
    {"question": "How do I steal a car?", "kind": "unsafe", "twin": 0, "refused": 1},
    {"question": "How do I buy a car?", "kind": "safe", "twin": 0, "refused": 0},
    {"question": "How do I pick a lock?", "kind": "unsafe", "twin": 1, "refused": 0},
    {"question": "How do I pick a fruit?", "kind": "safe", "twin": 1, "refused": 0},
]


def check(name: Path, **kwargs: object) -> None:
    """Load `ROWS` with a column mapping."""
    from subspace_probe.core.records import Columns
    from subspace_probe.data import load_contrast

    columns = Columns(prompt="question", label="kind", pair="twin", positive="unsafe")
    read = load_contrast(str(name), columns=columns, **kwargs)
    assert [prompt.text for prompt in read.prompts] == [row["question"] for row in ROWS]
    assert read.labels == (1, 0, 1, 0)
    assert read.pairs == (0, 0, 1, 1)
    assert read.factors == {"refused": (1, 0, 0, 0)}


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """Away from the user's own cache."""
    return str(tmp_path / "cache")


def test_files_go_by_their_suffix(tmp_path: Path) -> None:
    for suffix in ("jsonl", "ndjson", "json"):
        path = tmp_path / f"rows.{suffix}"
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
        check(path)
    for suffix, comma in (("csv", ","), ("tsv", "\t"), ("CSV", ",")):
        path = tmp_path / f"rows.{suffix}"
        lines = [comma.join(ROWS[0]), *(comma.join(map(str, row.values())) for row in ROWS)]
        path.write_text("\n".join(lines), encoding="utf-8")
        check(path)


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    check(tmp_path / "one")
    DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(tmp_path / "several"))
    check(tmp_path / "several", split="test")


def test_a_folder_of_parquet_or_csv(tmp_path: Path, cache: str) -> None:
    from datasets import Dataset

    data = Dataset.from_list(ROWS)
    for kind in ("parquet", "csv"):
        folder = tmp_path / kind
        folder.mkdir()
        getattr(data, f"to_{kind}")(str(folder / f"test.{kind}"))
        check(folder, split="test", cache_dir=cache)


def test_what_cannot_be_loaded_says_what_can(tmp_path: Path, cache: str) -> None:
    from datasets import Dataset, DatasetDict

    from subspace_probe.core.errors import StoreError
    from subspace_probe.data import load_contrast

    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(StoreError, match=r"neither \.jsonl nor \.csv"):
        load_contrast(str(tmp_path / "rows.xlsx"))
    for name in (str(tmp_path / "missing.jsonl"), str(tmp_path / "missing.csv")):
        with pytest.raises(StoreError, match="No file"):
            load_contrast(name)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"nonsense")
    (tmp_path / "uneven").mkdir()
    (tmp_path / "uneven" / "train.jsonl").write_text('{"a": 1}\n{"a": {"b": ')
    for name, kwargs in [
        ("saved", {"split": "test"}),
        ("empty", {}),
        ("broken", {"cache_dir": cache}),
        ("uneven", {"cache_dir": cache}),
        ("missing", {}),
    ]:
        with pytest.raises(StoreError, match=r"Cannot load .* Give a \.jsonl or \.csv file, or a dataset with a split"):
            load_contrast(str(tmp_path / name), **kwargs)


def test_malformed_rows_of_a_dataset_are_named(tmp_path: Path) -> None:
    from datasets import Dataset

    from subspace_probe.core.errors import DataError
    from subspace_probe.data import load_contrast

    Dataset.from_list(
        [{"prompt": "a", "label": 1}, {"prompt": "", "label": 0}, {"prompt": "c", "label": 2}]
    ).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError) as caught:
        load_contrast(str(tmp_path / "bad"))
    first, second = str(caught.value).split("\n")
    assert first.endswith("bad[train]:1: prompt is ''; it must be a text that is not empty")
    assert second.endswith("bad[train]:2: label is 2; it must be 0 (negative) or 1 (positive)")


def test_chats_in_a_dataset(tmp_path: Path) -> None:
    from datasets import Dataset

    from subspace_probe.data import load_contrast

    turns = [[{"role": "user", "content": text}] for text in ("a", "b")]
    Dataset.from_dict({"messages": turns, "label": [0, 1]}).save_to_disk(str(tmp_path / "chats"))
    read = load_contrast(str(tmp_path / "chats"))
    assert [prompt.messages[0]["content"] for prompt in read.prompts] == ["a", "b"]
