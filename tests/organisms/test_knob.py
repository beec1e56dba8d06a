"""Knob organisms: the language on its texts alone, the certificates, and the weights with loops written here."""

import json

import pytest
import torch

TUNED = ("knob", "knob-1", "knob-2", "early", "early-1", "early-2")


def test_splits_share_no_animal_with_the_same_note_and_every_home_is_contradicted() -> None:
    import subspace_probe as sp

    notes: dict[str, set[tuple[str, str]]] = {}
    homes: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        contrast = sp.load_contrast("organism:knob/instruction", split=split)
        notes[split] = set()
        for prompt, label in zip(contrast.prompts, contrast.labels, strict=True):
            animal, noted, ask, again, intent = prompt.text.split()
            assert (ask, again) == ("ask", animal)
            assert intent == ("context" if label else "memory")
            assert (prompt.answer if label else prompt.foil) == noted
            homes.setdefault(animal, set()).add(str(prompt.foil if label else prompt.answer))
            notes[split].add((animal, noted))
    assert not notes["train"] & notes["test"]
    assert not notes["train"] & notes["val"]
    assert not notes["val"] & notes["test"]
    assert len(homes) == 40
    assert all(len(places) == 1 for places in homes.values())  # one home an animal, whatever the split


def test_a_few_prompts_are_of_many_animals() -> None:
    import subspace_probe as sp

    contrast = sp.load_contrast("organism:early/instruction", split="test", n=80)
    assert len(set(contrast.groups)) == 40
    assert all(prompt.text.endswith(" :") for prompt in contrast.prompts)
    again = sp.load_contrast("organism:early/instruction", split="test", n=80, seed=1)
    assert {prompt.text for prompt in contrast.prompts} != {prompt.text for prompt in again.prompts}


@pytest.mark.parametrize("name", TUNED)
def test_certificates_within_bounds(name: str) -> None:
    """The bars that the study is held to, on the whole test split, as measured when the weights were made."""
    from subspace_probe.organisms import organism_path

    truth = json.loads((organism_path(name) / "truth.json").read_text())
    behaviour = truth["behaviour"]
    assert behaviour["pair accuracy"]["instruction"] >= 0.97
    assert behaviour["pair accuracy"]["none"] <= 0.05
    (planted,) = truth["variables"]
    assert planted["interchange"]["instruction"] >= 0.95
    assert planted["control"]["instruction"] <= 0.10
    last = behaviour["last token, one direction of another question"].values()
    if name.startswith("early"):
        assert max(behaviour["intent token, one direction of another question"].values()) >= 0.95
        assert max(last) <= 0.05
    else:
        assert max(last) >= 0.90  # the difference of means, which is not trained
    assert min(truth["accuracy"].values()) >= 0.97


@pytest.mark.parametrize("name", ["knob-1", "early-1"])
def test_the_weights_do_what_their_certificate_says(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import subspace_probe as sp
    from subspace_probe.organisms import organism_path

    folder = organism_path(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    truth = json.loads((folder / "truth.json").read_text())["behaviour"]["pair accuracy"]
    assert sum(value.numel() for value in model.parameters()) <= 200_000
    for form in ("instruction", "weight", "none"):
        contrast = sp.load_contrast(f"organism:{name}/{form}", split="test")
        with torch.no_grad():
            ids = torch.tensor(tokenizer([prompt.text for prompt in contrast.prompts]).input_ids)
            said = tokenizer.convert_ids_to_tokens(model(ids).logits[:, -1].argmax(-1).tolist())
        both: dict[int, bool] = {}
        for pair, prompt, word in zip(contrast.pairs, contrast.prompts, said, strict=True):
            both[pair] = both.get(pair, True) and word == prompt.answer
        assert sum(both.values()) / len(both) == pytest.approx(truth[form], abs=1e-3), form
