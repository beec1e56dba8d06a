"""Contrasts: what files may hold, which mistakes are reported and how, and splits that leak nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast


def contrast(labels: list[int], **columns: Any) -> "Contrast":
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    return Contrast("numbers", tuple(Prompt(str(i)) for i in range(len(labels))), tuple(labels), **columns)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(prompt: str, label: object, **more: object) -> str:
    return json.dumps({"prompt": prompt, "label": label} | more, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------- files
def test_json_lines_with_everything(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? Answer."}]
    path = write(
        tmp_path / "names.jsonl",
        row("one\u2028line", 1, pair="a", group=7, refused=0, answer="She", note="x"),
        row("two", "0", pair="a", group=7, refused=1, foil="He", note="y"),
        json.dumps({"messages": chat, "label": True, "pair": None, "instruction": "Why?", "refused": -3}),
        json.dumps({"text": "Once upon", "label": 0.0, "pair": "b", "refused": 2}),
    )
    read = Contrast.from_jsonl(path)
    assert read.name == "names"
    assert [prompt.shown for prompt in read.prompts] == ["one\u2028line", "two", "Why? Answer.", "Once upon"]
    assert read.labels == (1, 0, 1, 0)
    assert read.pairs == (0, 0, 1, 2)  # a row without a pair stands alone
    assert len(set(read.groups)) == 3
    assert read.factors == {"refused": (0, 1, -3, 2)}  # whole numbers in every row; `note` is no factor
    first, second, third, fourth = read.prompts
    assert (first.answer, second.foil, third.instruction) == ("She", "He", "Why?")
    assert fourth.raw
    assert not first.raw
    assert len(third.messages) == 2


def test_csv_reads_the_same(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast

    path = tmp_path / "names.csv"
    path.write_text('prompt,label,pair\n"one, ""two""\nthree",1,a\nfour,0,a\n', encoding="utf-8")
    read = Contrast.from_csv(path)
    assert read.prompts[0].text == 'one, "two"\nthree'
    assert (read.labels, read.pairs) == ((1, 0), (0, 0))
    tabs = tmp_path / "names.tsv"
    tabs.write_text("prompt\tlabel\none, two\t1\nthree\t0\n", encoding="utf-8")
    assert Contrast.from_csv(tabs).prompts[0].text == "one, two"


@pytest.mark.parametrize("name", ["bom.jsonl", "bom.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    from subspace_probe.core.contrasts import Contrast

    path, csv = tmp_path / name, "prompt,label\r\none,1\r\ntwo,0\r\n"
    path.write_bytes(
        b"\xef\xbb\xbf" + (csv if name.endswith("csv") else row("one", 1) + "\r\n" + row("two", 0)).encode()
    )
    read = Contrast.from_csv(path) if name.endswith("csv") else Contrast.from_jsonl(path)
    assert [prompt.text for prompt in read.prompts] == ["one", "two"]


def test_every_malformed_line_is_named(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError

    path = write(
        tmp_path / "bad.jsonl",
        row("fine", 1),
        "",
        '{"prompt": "x", "label": 1',
        "[1, 2]",
        row("x", 2),
        row("  ", 0),
        json.dumps({"prompt": "x"}),
        json.dumps({"label": 0, "question": "x"}),
        json.dumps({"label": 0, "messages": [{"role": "user"}]}),
        row("x", 0, instruction="y"),
        json.dumps({"label": 0, "messages": [{"role": "assistant", "content": "x"}]}),
        row("x", None),
    )
    with pytest.raises(DataError) as caught:
        Contrast.from_jsonl(path)
    expected = [
        ("bad.jsonl:2", "the line is empty"),
        ("bad.jsonl:3", "not JSON (Expecting ',' delimiter at column"),
        ("bad.jsonl:4", "a JSON object was expected, found list"),
        ("bad.jsonl:5", "label is 2; it must be 0 (negative) or 1 (positive)"),
        ("bad.jsonl:6", "prompt is '  '; it must be a text that is not empty"),
        ("bad.jsonl:7", "no column 'label'; found 'prompt'"),
        ("bad.jsonl:8", "no column 'prompt' or 'messages'; found 'label', 'question'"),
        ("bad.jsonl:9", "messages must be a list of {role, content} objects"),
        ("bad.jsonl:10", "The instruction 'y' is not part of the last user message 'x'"),
        ("bad.jsonl:11", "The last message of a prompt is from 'assistant'"),
    ]
    lines = str(caught.value).split("\n")
    for line, (place, why) in zip(lines, expected, strict=False):
        assert line.startswith(f"{place}: ")
        assert why in line
    assert lines[10:] == ["... and 1 more"]


def test_every_malformed_csv_row_is_named_by_its_first_line(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError

    path = tmp_path / "bad.csv"
    path.write_text('prompt,label\nfine,1\n"two\nlines",5\n\nx,0,0\ny\nz,0\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Contrast.from_csv(path)
    assert str(caught.value).split("\n") == [
        "bad.csv:3: label is '5'; it must be 0 (negative) or 1 (positive)",
        "bad.csv:5: the line is empty. Remove it.",
        "bad.csv:6: 3 cells, but the header has 2: prompt, label",
        "bad.csv:7: 1 cells, but the header has 2: prompt, label",
    ]
    for text, why in [
        ("prompt,label,label\nx,1,0\n", r"bad.csv:1: the header has 'label' twice"),
        ('prompt,label\nx,1\n"y,0\n', r"bad.csv:3: not CSV .*unclosed quotation mark"),
        ("\nprompt,label\n", r"bad.csv:1: a header line"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=why):
            Contrast.from_csv(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv"])
def test_files_with_nothing_in_them(tmp_path: Path, name: str) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError, StoreError

    read = Contrast.from_csv if name.endswith("csv") else Contrast.from_jsonl
    for content in ("", "\n\n", "\ufeff"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=f"{name}: the file is empty"):
            read(tmp_path / name)
    with pytest.raises(StoreError, match=r"No file .*missing"):
        read(tmp_path / "missing")
    with pytest.raises(StoreError, match="Cannot read"):
        read(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00p")
    with pytest.raises(StoreError, match="must be a UTF-8 text file"):
        read(tmp_path / name)


def test_one_class_is_no_contrast(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError

    path = write(tmp_path / "ones.jsonl", row("a", 1), row("b", 1))
    with pytest.raises(DataError, match=r"'ones' has 2 positive \(label 1\) and 0 negative \(label 0\) prompts"):
        Contrast.from_jsonl(path)
    header = tmp_path / "header.csv"
    header.write_text("prompt,label\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"0 positive .* 0 negative"):
        Contrast.from_csv(header)


def test_columns_by_other_names(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.records import Columns

    path = write(
        tmp_path / "other.jsonl",
        json.dumps({"question": "a", "kind": "safe", "twin": 1, "topic": "x"}),
        json.dumps({"question": "b", "kind": "unsafe", "twin": 1, "topic": "x"}),
    )
    columns = Columns(prompt="question", label="kind", pair="twin", group="topic", positive="unsafe")
    read = Contrast.from_jsonl(path, columns=columns)
    assert (read.labels, read.pairs, read.groups) == ((0, 1), (0, 0), (0, 0))
    assert read.factors == {}
    with pytest.raises(DataError, match="no column 'label'; found 'question', 'kind', 'twin', 'topic'"):
        Contrast.from_jsonl(path, columns=Columns(prompt="question"))


def test_columns_that_only_look_like_numbers_are_no_factors(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast

    path = tmp_path / "odd.csv"
    path.write_text("prompt,label,dashes,squared,part,good\na,1,--5,²,1.5, 3\nb,0,1,2,2,-4\n", encoding="utf-8")
    assert Contrast.from_csv(path).factors == {"good": (3, -4)}


# --------------------------------------------------------------------------------------------------------------- splits
def test_a_split_keeps_pairs_and_groups_together() -> None:
    labels = [i % 2 for i in range(80)]
    pairs = tuple(i // 2 for i in range(80))
    groups = tuple((i // 2) // 3 for i in range(80))  # three pairs share a source
    whole = contrast(labels, pairs=pairs, groups=groups)
    for seed in range(5):
        parts = whole.split(0.5, seed=seed)
        for column in ("pairs", "groups"):
            first, second = (set(getattr(part, column)) for part in parts)
            assert not first & second
        assert sorted(int(prompt.text) for part in parts for prompt in part.prompts) == list(range(80))
        assert [sum(part.labels) * 2 for part in parts] == [len(part) for part in parts]
        assert abs(len(parts[0]) - 40) <= 6  # one group
    assert len({whole.split(0.5, seed=seed)[0].prompts for seed in range(5)}) == 5


def test_pairs_and_groups_that_overlap_are_kept_together() -> None:
    """A pair whose rows are in two groups joins these groups."""
    whole = contrast(
        [0, 1] * 6, pairs=(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5), groups=(9, 8, 8, 7, 6, 6, 5, 5, 4, 4, 3, 3)
    )
    for seed in range(10):
        first, _ = whole.split(0.5, seed=seed)
        assert len({int(prompt.text) for prompt in first.prompts} & {0, 1, 2, 3}) in (0, 4)


def test_a_split_keeps_the_balance_of_the_classes() -> None:
    whole = contrast([1] * 30 + [0] * 90)
    for fraction in (0.2, 0.5, 0.8):
        first, second = whole.split(fraction, seed=0)
        assert len(first) == round(fraction * 120)
        assert sum(first.labels) == len(first) / 4
        assert sum(second.labels) == len(second) / 4


def test_groups_of_many_sizes_do_not_all_fall_on_one_side() -> None:
    sizes = [size for size in range(1, 21)]
    groups = tuple(group for group, size in enumerate(sizes) for _ in range(size))
    whole = contrast([i % 2 for i in range(len(groups))], groups=groups, pairs=groups)
    for fraction in (0.2, 0.5, 0.8):
        first, _ = whole.split(fraction, seed=1)
        assert abs(len(first) - fraction * len(whole)) <= 20


def test_a_split_is_a_function_of_its_seed() -> None:
    whole = contrast([0, 1] * 20, factors={"refused": tuple(range(40))})
    first, second = whole.split(0.3, seed=4)
    assert first == whole.split(0.3, seed=4)[0]
    assert first != whole.split(0.3, seed=5)[0]
    assert [whole.take(rows) for rows in whole.split_rows(0.3, seed=4)] == [first, second]
    assert first.factors["refused"] == tuple(int(prompt.text) for prompt in first.prompts)


def test_splits_that_cannot_be_made() -> None:
    from subspace_probe.core.errors import ConfigError

    whole = contrast([0, 1, 0, 1], groups=(0, 0, 0, 0))
    with pytest.raises(ConfigError, match="4 prompts in 1 groups, and a split keeps groups together"):
        whole.split(0.5, seed=0)
    for fraction in (0.0, 1.0, -0.5, 50.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            whole.split(fraction, seed=0)


# ------------------------------------------------------------------------------------------------------------ selecting
def test_rows_are_chosen_by_label_and_factor() -> None:
    from subspace_probe.core.errors import UnknownName

    whole = contrast([1, 1, 0, 0], factors={"refused": (1, 0, 1, 0)})
    assert [prompt.text for prompt in whole.where(label=1, refused=0).prompts] == ["1"]
    assert [prompt.text for prompt in whole.where(refused=1).prompts] == ["0", "2"]
    relabelled = whole.relabel("refused")
    assert (relabelled.name, relabelled.labels) == ("numbers/refused", (1, 0, 1, 0))
    assert relabelled.factors["label"] == whole.labels
    for call in (lambda: whole.where(refusd=1), lambda: whole.relabel("refusd")):
        with pytest.raises(UnknownName, match=r"Unknown factor 'refusd'\. Did you mean 'refused'"):
            call()


def test_a_sample_is_as_balanced_as_the_data_allow() -> None:
    whole = contrast([1] * 10 + [0] * 50)
    for n, positives in [(8, 4), (40, 10), (60, 10), (200, 10), (1, 0)]:
        part = whole.sample(n, seed=0)
        assert len(part) == min(n, 60)
        assert sum(part.labels) == positives
        assert len(set(part.prompts)) == len(part)


def test_columns_of_unequal_length_and_other_labels() -> None:
    from subspace_probe.core.errors import DataError

    with pytest.raises(DataError, match=r"has 2 prompts, but pairs has 1, refused has 3 entries"):
        contrast([0, 1], pairs=(0,), factors={"refused": (0, 1, 0)})
    with pytest.raises(DataError, match=r"has labels \[-1, 2\]. Labels are 0"):
        contrast([0, 2, -1])


def test_it_shows_itself() -> None:
    whole = contrast([0, 1]).map(lambda prompt: type(prompt)(f"<{prompt.text}>"))
    assert repr(whole) == "Contrast('numbers': 1 positive, 1 negative)"
    assert "&lt;0&gt;" in whole._repr_html_()


def test_the_two_sides_of_pairs_ask_the_same_question() -> None:
    from dataclasses import replace

    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.prompts import Prompt

    def sides(*answers: tuple[str | None, str | None]) -> list[tuple[str | None, str | None]]:
        prompts = tuple(Prompt(str(i), answer=answer, foil=foil) for i, (answer, foil) in enumerate(answers))
        made = Contrast("c", prompts, (0, 1), pairs=(4, 4)).sides()
        assert [side.prompts[0].text for side in made] == ["1", "0"]
        return [(side.prompts[0].answer, side.prompts[0].foil) for side in made]

    assert sides(("no", None), ("yes", None)) == [("yes", "no")] * 2
    assert sides(("sure", "sorry"), ("sure", "sorry")) == [("sure", "sorry")] * 2  # said already
    assert sides(("no", "x"), ("yes", "y")) == [("yes", "no")] * 2
    assert sides(("no", None), (None, None)) == [("no", None)] * 2
    assert sides((None, None), (None, None)) == [(None, None)] * 2
    mixed = contrast([1, 0, 1, 0, 1], pairs=(7, 7, 2, 2, 3))
    assert [p.text for side in mixed.sides() for p in side.prompts] == ["0", "2", "1", "3"]
    assert mixed.first_pairs(1).pairs == (7, 7)
    assert len(mixed.first_pairs(9)) == 4
    with pytest.raises(DataError, match="None of the 5 pairs"):
        replace(mixed, pairs=(0, 1, 2, 3, 4)).sides()


def test_files_of_one_class_need_no_labels(tmp_path: Path) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.records import read_jsonl

    path = tmp_path / "benign.jsonl"
    path.write_text('{"prompt": "a", "group": "g"}\n{"prompt": "b", "group": "g"}\n{"prompt": "c", "label": 0}\n')
    found = Contrast.from_records(read_jsonl(path), name="benign", label=0)
    assert found.labels == (0, 0, 0)
    assert found.groups[0] == found.groups[1] != found.groups[2]
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "label": 1}\n{"prompt": "c", "label": 2}\n')
    with pytest.raises(DataError, match=r"benign\.jsonl:2: label is 1, in a file whose rows are all to be 0") as caught:
        Contrast.from_records(read_jsonl(path), name="benign", label=0)
    assert "benign.jsonl:3: label is 2" in str(caught.value)


@pytest.mark.parametrize("line", ['{"n": ' + "1" * 5000 + "}", "[" * 200_000])
def test_json_that_python_cannot_read(tmp_path: Path, line: str) -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import DataError

    (tmp_path / "odd.jsonl").write_text(f'{{"prompt": "a", "label": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"odd\.jsonl:2: JSON that cannot be read"):
        Contrast.from_jsonl(tmp_path / "odd.jsonl")
