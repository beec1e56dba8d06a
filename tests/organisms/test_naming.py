"""The organisms of indirect object identification: their language, and what is true of them."""

from pathlib import Path

import pytest
import torch

NAMES = ("ioi",)


def test_pairs_differ_in_who_is_repeated() -> None:
    """Answers by a causal reading of the words alone."""
    import subspace_probe as sp
    from subspace_probe.organisms.naming import NAMES as PEOPLE

    contrast = sp.load_contrast("organism:ioi/ioi", split="test", n=100)
    for row in range(0, 100, 2):
        one, two = (contrast.prompts[row + k].text.split() for k in (0, 1))
        assert sum(a != b for a, b in zip(one, two, strict=True)) == 1
        for words, label in ((one, 0), (two, 1)):
            first, second, repeated = (word for word in words if word in PEOPLE)
            assert repeated == (first if label else second)
            prompt = contrast.prompts[row + label]
            assert (prompt.answer, prompt.foil) == ((second, first) if label else (first, second))


def test_splits_share_no_pair_of_names() -> None:
    import subspace_probe as sp
    from subspace_probe.organisms.naming import NAMES as PEOPLE

    seen = [
        {
            frozenset(word for word in prompt.text.split() if word in PEOPLE)
            for prompt in sp.load_contrast("organism:ioi/ioi", split=split, n=400).prompts
        }
        for split in ("train", "val", "test")
    ]
    assert not seen[0] & (seen[1] | seen[2])
    assert not seen[1] & seen[2]


def test_facts_ask_the_same_of_two_subjects() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, UnknownName
    from subspace_probe.organisms.words import CAPITAL_OF, DISH_OF

    facts = sp.load_contrast("organism:ioi/facts", n=60)
    for row in range(0, 60, 2):
        one, two = facts.prompts[row : row + 2]
        assert one.answer != two.answer
        assert one.foil == two.answer
        known = CAPITAL_OF if "capital" in one.text else DISH_OF
        assert one.answer == known[str(one.instruction)]
    with pytest.raises(UnknownName, match="facts"):
        sp.load_contrast("organism:ioi/fact")
    with pytest.raises(ConfigError, match="at least 2"):
        sp.load_contrast("organism:ioi/ioi", n=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_position_is_where_the_certificate_says(name: str) -> None:
    """By exchanges of certificates' own hooks on other pairs; a random vector, and the block below, do nothing."""
    import subspace_probe as sp
    from subspace_probe.core.sites import Site
    from subspace_probe.organisms import load_truth
    from subspace_probe.organisms.exchanging import Exchange

    model, planted = sp.load_model(f"organism:{name}"), load_truth(name).planted("position")
    held = Exchange(model, sp.load_contrast(f"organism:{name}/ioi", split="test", n=200, seed=5), sp.LAST)
    assert held.right() >= 0.97
    assert held.flips(planted.site, planted.vector[None]) >= 0.95
    random = torch.nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(3)))
    assert held.flips(planted.site, random) <= 0.05
    assert held.flips(Site(planted.site.layer, "mlp_out")) <= 0.05  # what makes this MLP one to host an illusion
    assert planted.accuracy >= 0.97
    assert max(planted.control["moved"], 0.0) <= 0.05
    assert sum(p.numel() for p in model.backend.hf.parameters()) <= 200_000


def test_training_is_reproducible(tmp_path: Path) -> None:
    from subspace_probe.organisms.training import train

    states = []
    for part in ("one", "two"):
        folder = train("ioi", tmp_path / part, steps=2, progress=False)
        states.append((folder / "model.safetensors").read_bytes())
        assert (folder / "truth.json").is_file()
    assert states[0] == states[1]
