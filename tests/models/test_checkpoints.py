"""Weights read one at a time, against the models that transformers loads whole."""

from pathlib import Path

import pytest
import torch


def _whole(name: str) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    from subspace_probe.organisms import organism_path

    return dict(AutoModelForCausalLM.from_pretrained(organism_path(name), dtype=torch.float32).named_parameters())


def test_streamed_differences_are_those_of_loaded_models() -> None:
    from subspace_probe.models.checkpoints import open_checkpoint, shared_weights
    from subspace_probe.organisms import organism_path

    base, aligned = (open_checkpoint(organism_path(name)) for name in ("flagged-base", "flagged"))
    first, second = _whole("flagged-base"), _whole("flagged")
    names = shared_weights(base, aligned)
    assert set(names) == set(first)
    for name in names:
        assert torch.equal(aligned.read(name) - base.read(name), second[name] - first[name]), name
        assert base.shapes[name] == tuple(first[name].shape)
    changed = [name for name in names if not torch.equal(first[name], second[name])]
    assert changed  # control: the two checkpoints do differ


def test_sharded_and_stray_files(tmp_path: Path) -> None:
    """Shards are read by their index; a file that it does not name, such as an adapter's, is not."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from subspace_probe.models.checkpoints import open_checkpoint
    from subspace_probe.organisms import organism_path

    model = AutoModelForCausalLM.from_pretrained(organism_path("flagged"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file({"stray": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    found = open_checkpoint(tmp_path)
    assert set(found.shapes) == set(_whole("flagged"))
    for name, value in _whole("flagged").items():
        assert torch.equal(found.read(name), value)


def test_a_model_in_memory_is_read_as_a_copy() -> None:
    """What is written to the model afterwards is not in what was read, and the weights come back bit by bit."""
    import subspace_probe as sp
    from subspace_probe.models.checkpoints import open_checkpoint, rewritten

    model, name = sp.load_model("organism:flagged"), "model.layers.0.mlp.down_proj.weight"
    checkpoint, truth = open_checkpoint(model), _whole("flagged")[name]
    read = checkpoint.read(name)
    with rewritten(model) as write:
        write(name, torch.zeros_like(read))
        assert torch.equal(read, truth)
        assert float(checkpoint.read(name).abs().max()) == 0.0  # control: the model itself was written to
    assert torch.equal(checkpoint.read(name), truth)


def test_rewritten_weights_come_back_after_an_error() -> None:
    import subspace_probe as sp
    from subspace_probe.models.checkpoints import rewritten

    model = sp.load_model("organism:flagged")
    before = {name: value.clone() for name, value in model.backend.hf.named_parameters()}

    def interrupted() -> None:
        with rewritten(model) as write:
            for name, value in before.items():
                write(name, value + 1)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    assert all(torch.equal(before[name], value) for name, value in model.backend.hf.named_parameters())


def test_weights_that_one_lacks_are_left_out_and_mismatches_named() -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError
    from subspace_probe.models.checkpoints import Checkpoint, shared_weights
    from subspace_probe.studies.safety_projection import Lineage

    def made(name: str, **shapes: tuple[int, ...]) -> Checkpoint:
        return Checkpoint(name, shapes, lambda weight: torch.ones(shapes[weight]))

    one, two = made("one", a=(2, 3), head=(4, 3)), made("two", a=(2, 3), extra=(1, 1))
    assert shared_weights(one, two) == ("a",)
    assert Lineage.read(one, {"useful": two}, most=1.0).skipped == ("extra", "head")
    with pytest.raises(ShapeError, match=r"a has shape \(2, 3\) in one and \(3, 2\) in three"):
        shared_weights(one, made("three", a=(3, 2)))
    with pytest.raises(ConfigError, match=r"one: a, \.\.\.; four: b"):
        shared_weights(one, made("four", b=(2, 3)))


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.models.checkpoints import open_checkpoint

    with pytest.raises(StoreError, match="No checkpoint folder"):
        open_checkpoint("/nowhere/at/all")
    with pytest.raises(StoreError, match="save_pretrained"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(StoreError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_weights_with_the_vocabulary_on_one_side() -> None:
    import subspace_probe as sp
    from subspace_probe.models.checkpoints import open_checkpoint, vocabulary_weights

    model = sp.load_model("organism:override")
    found = vocabulary_weights(model)
    shapes = open_checkpoint(model).shapes
    assert {name for name in shapes if "embed_tokens" in name or "lm_head" in name} == found & set(shapes)
    assert found
