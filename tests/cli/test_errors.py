"""Bad input ends in one clear message, exit code 2, and no file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import UPPER, Cli, write_rows


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(cli: Cli, *args: object) -> str:
    """The message of a command that must fail with 2 and leave the folder as it was."""
    before = files(Path())
    result = cli(*args)
    assert result.exit_code == 2, result.output
    assert files(Path()) == before
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--site": "resid_posst"}, "Unknown stream 'resid_posst'. Did you mean 'resid_post'? Known: attn_out"),
        ({"--site": "L9.resid_post"}, "Layer 9 was asked for, but the model has 2 layers. Use 0 to 1"),
        ({"--site": "block3"}, "Unknown stream 'block3'"),
        ({"--site": "L1"}, "Unknown stream 'L1'"),
        ({"--where": "lasst"}, "Unknown position 'lasst'. Did you mean 'last'?"),
        ({"--where": "t_inst"}, "has no position 't_inst': it has no chat template"),
        ({"--where": "last-9"}, "it is too short"),
        ({"--where": "span:zebra"}, "The text 'zebra' does not occur in prompt 0"),
        ({"--finder": "mean_diff"}, "Unknown finder 'mean_diff'. Did you mean 'mean_difference'?"),
        ({"--set": "pared=true"}, "Unknown setting of mean_difference 'pared'. Did you mean 'paired'?"),
        ({"--set": "paired=maybe"}, "--set paired=maybe: true or false was expected."),
        ({"--set": "paired"}, "--set 'paired' was given. Write it as name=value."),
        ({"--model": "organism:chta"}, "Unknown organism 'chta'. Did you mean 'chat'? Known: chat, chat-base"),
        ({"--model": "./none"}, "No model folder './none'"),
        ({"--backend": "nativ"}, "Unknown backend 'nativ'. Did you mean 'native'?"),
        ({"--dtype": "float31"}, "Unknown dtype 'float31'. Did you mean 'float32'?"),
        ({"--device": "toaster"}, "Device 'toaster' cannot be used"),
        ({"--template": "thinking"}, "--template 'thinking' was given. Write it as name=value."),
        ({"--contrast": "none.jsonl"}, "No file 'none.jsonl'"),
        ({"--contrast": "organism:chat/request"}, "Unknown organism contrast 'request'. Did you mean 'requests'?"),
        ({"--contrast": "organism:chat/requests", "--split": "tset"}, "Unknown split 'tset'. Did you mean 'test'?"),
        ({"--columns": "promt=text"}, "Unknown role in --columns 'promt'. Did you mean 'prompt'?"),
        ({"--columns": "label=is_bad"}, "colours.jsonl:1: no column 'is_bad'; found 'prompt', 'label', 'pair'"),
        ({"--split": "train"}, "is one file. Leave it out."),
        ({"--out": "colours.jsonl/direction"}, "Cannot write 'colours.jsonl/direction'"),
        ({"--out": "/proc/direction"}, "Cannot write '/proc/direction'"),
        ({"--out": "."}, "it is a folder. Give the name of a file."),
    ],
)
def test_find_says_what_is_wrong(cli: Cli, tiny: Path, colours: Path, options: dict[str, str], message: str) -> None:
    given = {"--model": str(tiny), "--contrast": colours.name, "--out": "direction.safetensors"} | options
    assert message in refused(cli, "find", *(part for pair in given.items() for part in pair), "--quiet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.jsonl: the file is empty"),
        ('{"prompt": "a red", "label": 1}\n', "has 1 positive (label 1) and 0 negative (label 0) prompts"),
        ('{"prompt": "a", "label": 1}\n\n{"prompt": "b", "label": 0}\n', "bad.jsonl:2: the line is empty"),
        ('{"prompt": "a", "label": 1}\n{"prompt": "b", "label": 2}\n', "bad.jsonl:2: label is 2; it must be 0"),
        ('{"prompt": "a", "label": 1}\n{"prompt": "b",\n', "bad.jsonl:2: not JSON"),
        ('{"prompt": "", "label": 1}\n{"text": "b", "label": 0}\n', "bad.jsonl:1: prompt is ''; it must be a text"),
        ('{"messages": [], "label": 1}\n{"quest": "b", "label": 0}\n', "bad.jsonl:2: no column 'prompt' or 'messages'"),
    ],
)
def test_a_contrast_that_is_none(cli: Cli, tiny: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    assert message in refused(cli, "find", "--model", tiny, "--contrast", "bad.jsonl")
    assert message in refused(cli, "capture", "--model", tiny, "--contrast", "bad.jsonl", "--out", "acts")


def test_prompts_longer_than_the_context(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a " * (40 if i == 7 else 4), "label": i % 2} for i in range(24)]
    write_rows(tmp_path / "long.jsonl", rows)
    message = refused(cli, "find", "--model", tiny, "--contrast", "long.jsonl")
    assert "1 prompts are longer than the model's context of 32 tokens; the first is prompt 7 with 40 tokens" in message


def test_too_few_prompts_to_choose_a_site(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "few.jsonl", [{"prompt": f"a {w}", "label": i % 2} for i, w in enumerate("bcde")])
    assert "choosing a site needs at least 8" in refused(cli, "find", "-q", "--model", tiny, "--contrast", "few.jsonl")


def test_a_template_without_an_instruction_span(cli: Cli, make_model: Callable[..., Path], colours: Path) -> None:
    model = make_model(template=UPPER)
    message = refused(cli, "find", "--model", model, "--contrast", colours.name, "--where", "t_inst")
    assert "The instruction cannot be found in the rendered chat: this template changes" in message


@pytest.fixture
def direction(cli: Cli, tiny: Path, colours: Path) -> str:
    """A direction of the tiny model, without its null: what it is does not matter here."""
    import subspace_probe as sp

    model, contrast = sp.load_model(str(tiny)), sp.load_contrast(colours.name)
    acts = model.capture(contrast, sites=sp.Site(1))
    sp.MeanDifference(null_draws=0).fit(acts, sp.Site(1)).save("direction.safetensors")
    return "direction.safetensors"


def test_a_direction_of_another_model(cli: Cli, tiny: Path, make_model: Callable[..., Path], direction: str) -> None:
    steer = ("steer", "--direction", direction, "--strength", "1", "--prompt", "the dog", "--max-new-tokens", 2, "-q")
    same_width, wider = make_model(seed=1), make_model(width=32)
    message = refused(cli, *steer, "--model", same_width)
    assert "but is used with a model of fingerprint" in message
    assert "--allow-model-mismatch" in message
    assert cli(*steer, "--model", same_width, "--allow-model-mismatch").exit_code == 0
    wrong = refused(cli, *steer, "--model", wider, "--allow-model-mismatch", "--out", "report")
    assert "A subspace of width 16 was used where the activations have width 32" in wrong
    assert cli(*steer, "--model", tiny).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--strength": "much"}, "--strength 'much' is not a list of numbers"),
        ({"--strength": "1,inf"}, "Give finite numbers"),
        ({"--direction": "none.safetensors"}, "No file 'none.safetensors'"),
        ({"--direction": "colours.jsonl"}, "is not a readable safetensors file"),
        ({"--answer": "She"}, "--answer and --foil belong together"),
        ({"--answer": "She", "--foil": "zebra"}, "The tokenizer has no token for 'zebra'"),
        ({"--answer": "She", "--foil": "She"}, "'She' and 'She' begin with the same token"),
        ({"--contrast": "colours.jsonl"}, "Both --prompt and --contrast were given"),
        ({"--prompt": " "}, "empty or only white space"),
        ({"--site": "L7.resid_post"}, "Layer 7 was asked for, but the model has 2 layers"),
        ({"--site": "L0.mlp_post"}, "of width 16 was used where the activations have width 32"),
        ({"--where": "t_post_inst"}, "has no position 't_post_inst'"),
        ({"--out": "colours.jsonl"}, "it is a file. Choose a folder."),
        ({"--max-new-tokens": "64"}, "context"),
    ],
)
def test_steer_says_what_is_wrong(cli: Cli, tiny: Path, direction: str, options: dict[str, str], message: str) -> None:
    given = {"--model": str(tiny), "--direction": direction, "--strength": "1", "--prompt": "the dog"}
    given |= {"--max-new-tokens": "4"} | options
    assert message in refused(cli, "steer", *(part for pair in given.items() for part in pair), "-q")


def test_outputs_are_checked_before_the_work(
    cli: Cli, tiny: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subspace_probe

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(subspace_probe, "load_model", load)
    for out in ("/proc/acts", "colours.jsonl", "colours.jsonl/deeper/acts"):
        assert "Cannot write" in refused(cli, "capture", "--model", tiny, "--contrast", colours.name, "--out", out)
        assert "Cannot write" in refused(cli, "demo", "--out", out)
        assert "Cannot write" in refused(cli, "study", "harmfulness", "--model", tiny, "--out", out)
        assert "Cannot write" in refused(cli, "organisms", "train", "chat", "--out", out)


def test_a_report_that_is_none(cli: Cli, tmp_path: Path) -> None:
    assert "No report at 'none.json'" in refused(cli, "report", "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"format": "other"}))
    assert "Not a report of this package" in refused(cli, "report", "other.json")


def test_unknown_organisms_and_studies(cli: Cli) -> None:
    assert "Unknown organism 'chatt'. Did you mean 'chat'?" in refused(cli, "organisms", "show", "chatt")
    assert "Unknown organism 'chatt'. Did you mean 'chat'?" in refused(cli, "organisms", "train", "chatt", "--out", "x")
    assert "Unknown study 'harm'. Did you mean 'harmfulness'?" in refused(cli, "study", "harm", "--model", "x")
    assert "No model was given for harmfulness" in refused(cli, "study", "harmfulness")


def test_unknown_options_and_verbs(cli: Cli) -> None:
    for args in (["find", "--modle", "x"], ["finf"], ["steer"], ["demo", "--seed", "-1"], ["demo", "--seed", "x"]):
        assert cli(*args).exit_code == 2


def test_interrupted(cli: Cli, tiny: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.models.hooked import HookedModel

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedModel, "capture", interrupted)
    before = files(Path())
    result = cli("capture", "--model", tiny, "--contrast", colours.name, "--out", "acts")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert files(Path()) == before


def test_debug_shows_where(cli: Cli) -> None:
    from subspace_probe.core.errors import StoreError

    result = cli("report", "none.json", "--debug")
    assert isinstance(result.exception, StoreError)
