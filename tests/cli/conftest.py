"""A runner of the command, tiny models to run it on, and a contrast of names."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typer.testing import Result

    from subspace_probe.models.hooked import HookedModel

WORDS = "<unk> <s> </s> a b c d e red green blue one two three She He said the dog cat . yes no".split()
GIRLS = "Lily Mia Anna Sara Lucy Emma Amy Sue Molly Jane Daisy Ella Mary Zoe Kitty Bella".split()
BOYS = "Tim Tom Ben Max Jack Sam Bob Tommy Billy Joe Timmy Jim Mark Leo Fred John".split()
OPENINGS = (
    "Once upon a time, there was a little child named {0}.",
    "One day, a child named {0} went to the park.",
    "Once there was a child called {0}. Everyone loved {0}.",
    "In a small house lived a child named {0}.",
)
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
UPPER = "{% for m in messages %}<s>{{ m['content'] | upper }}</s>{% endfor %}"

QUICK = ("--site", "L1.resid_post", "--set", "null_draws=19")
"""Of `find`, where what it finds does not matter."""

Cli = Callable[..., "Result"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in an empty folder: `cli("find", "--model", folder)`."""
    from typer.testing import CliRunner

    from subspace_probe.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an organism's contrast, 128 prompts: a command takes all, and what it prints does not depend on how many."""
    import subspace_probe as sp

    monkeypatch.setattr(sp, "load_contrast", partial(sp.load_contrast, n=128))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random Llama with a word-level tokenizer; every call makes another folder."""

    def make(*, width: int = 16, seed: int = 0, template: str | None = None, context: int = 32) -> Path:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("model")
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=context, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    """A random model of two layers, without a chat template."""
    return make_model()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Prompts that differ in one word the tiny models know."""
    rows = []
    starts = [f"{x} {y}" for x in "a b c d e".split() for y in "one two three dog cat said the green".split()]
    for pair, rest in enumerate(starts):
        rows += [{"prompt": f"{rest} {word}", "label": y, "pair": pair} for word, y in (("red", 1), ("blue", 0))]
    return write_rows(tmp_path / "colours.jsonl", rows)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """Story openings about girls (1) and boys (0)."""
    rows = []
    for opening in OPENINGS:
        for girl, boy in zip(GIRLS, BOYS, strict=True):
            pair = len(rows) // 2
            rows += [{"prompt": opening.format(name), "label": y, "pair": pair} for name, y in ((girl, 1), (boy, 0))]
    return write_rows(tmp_path / "names.jsonl", rows)


@pytest.fixture(scope="session")
def stories_folder(stories: "HookedModel") -> Path:
    """Where the pretrained model of 260 thousand parameters lies."""
    assert stories.directory is not None
    return stories.directory
