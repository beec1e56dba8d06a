"""Models between two checkpoints, against the formula on every parameter."""

import pytest
import torch


@pytest.fixture(scope="module")
def ends():
    import subspace_probe as sp

    return sp.load_model("organism:knob-base"), sp.load_model("organism:knob")


def test_ends_are_the_models_and_the_middle_is_the_mean(ends) -> None:
    from subspace_probe.models.blending import blended

    first, second = (dict(model.backend.hf.named_parameters()) for model in ends)
    before = {name: value.clone() for name, value in first.items()}
    for share in (0.0, 0.25, 1.0):
        made = dict(blended(*ends, share).backend.hf.named_parameters())
        for name, value in made.items():
            wanted = (1 - share) * first[name].double() + share * second[name].double()
            assert torch.allclose(value.double(), wanted, atol=1e-6), name
    assert all(torch.equal(first[name], before[name]) for name in first)
    assert any(not torch.allclose(first[name], second[name], atol=1e-3) for name in first)  # the control: they differ


def test_another_shape_and_standing_interventions_are_refused(ends) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.models.blending import blended

    with pytest.raises(ConfigError, match="nothing between"):
        blended(sp.load_model("organism:override"), ends[1], 0.5)
    direction = sp.Subspace.span(torch.ones(64), site=sp.Site(1))
    with ends[0].intervened(sp.Ablate(direction)) as changed, pytest.raises(ConfigError, match="standing"):
        blended(changed, ends[1], 0.5)
