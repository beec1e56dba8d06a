"""Models from folders and from memory, and every way in which that can fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import text, tiny, words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as a Hugging Face folder."""
    path = tmp_path / "model"
    tiny("llama").save_pretrained(path)
    words().save_pretrained(path)
    return path


def test_a_folder_gives_the_model_that_was_saved(folder: Path) -> None:
    from subspace_probe.models import load_model

    for name in (folder, str(folder)):
        loaded = load_model(name)
        memory = load_model(tiny("llama"), tokenizer=words())
        assert torch.equal(loaded.logits(text(5, 1)), memory.logits(text(5, 1)))
        assert loaded.spec.name == str(folder)
        assert loaded.fingerprint == memory.fingerprint
        assert loaded.directory == folder
    assert load_model(folder, dtype=torch.bfloat16).backend.hf.dtype == torch.bfloat16
    assert load_model(folder, device="cpu").backend.device.type == "cpu"
    assert "LlamaForCausalLM, 3 layers, d_model 32" in repr(loaded)


def test_an_encoder_folder(tmp_path: Path) -> None:
    from subspace_probe.models import load_model

    tiny("bert").save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.spec.encoder
    assert not loaded.chats


def test_behaviour_words_come_from_the_folder_and_from_the_user(folder: Path) -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.models import METADATA, load_model

    (folder / METADATA).write_text(json.dumps({"words": {"refusal": ["w4"], "harmful": ["w5", "w6"]}}))
    loaded = load_model(folder, words={"refusal": ("w9",)})
    assert loaded.words == {"refusal": ("w9",), "harmful": ("w5", "w6")}
    for bad in ("{", "[]", '{"words": 3}'):
        (folder / METADATA).write_text(bad)
        with pytest.raises(StoreError, match=r"not valid metadata.*JSON object with 'words'"):
            load_model(folder)


def test_what_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    from subspace_probe.core.errors import BackendError, StoreError, UnknownName
    from subspace_probe.models import load_model

    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "missing", StoreError, "No model folder"),
        (str(tmp_path / "missing"), StoreError, "No model folder"),
        ("./missing", StoreError, "No model folder"),
        ("missing/hub-model", StoreError, r"Cannot load 'missing/hub-model'.*hub id"),
        (str(empty), StoreError, "Cannot load"),
        (tiny("llama"), BackendError, "without a tokenizer"),
    ]
    for name, kind, why in cases:
        with pytest.raises(kind, match=why):
            load_model(name)
    with pytest.raises(UnknownName, match=r"Unknown backend 'nativ'\. Did you mean 'native'"):
        load_model(folder, backend="nativ")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b'{"added_tokens": []}'])
def test_damaged_folders(folder: Path, file: str, content: bytes) -> None:
    from subspace_probe.core.errors import SubspaceProbeError
    from subspace_probe.models import load_model

    (folder / file).write_bytes(content)
    with pytest.raises(SubspaceProbeError, match="Cannot load"):
        load_model(folder)


def test_a_family_without_a_layout(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from subspace_probe.core.errors import BackendError
    from subspace_probe.models import load_model

    config = OPTConfig(vocab_size=128, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=r"type 'opt' have no layout here\. Known: bert, bloom"):
        load_model(tmp_path)
