"""Orthogonal controls against the definition: orthogonal to the knob, and every state moved as far."""

import pytest
import torch


def _knob(width: int = 24, n: int = 10, where: str = "last"):
    import subspace_probe as sp
    from subspace_probe.core.sites import Site

    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    direction = sp.Subspace.span(vector, site=Site(1))
    values = torch.linspace(-4, 4, n)
    return sp.KnobClamp(direction, values, where=sp.Where.parse(where)), torch.randn(
        n, width, generator=torch.Generator().manual_seed(4)
    )


def test_directions_are_orthogonal_and_fill_the_complement() -> None:
    from subspace_probe.diagnostics.knob_controls import orthogonal_directions

    clamp, _ = _knob()
    drawn = torch.stack([d.unit for d in orthogonal_directions(clamp.subspace, 200, seed=0)])
    assert float((drawn @ clamp.subspace.unit).abs().max()) < 1e-5
    assert torch.allclose(drawn.norm(dim=1), torch.ones(200), atol=1e-5)
    assert int(torch.linalg.matrix_rank(drawn, tol=1e-3)) == 23
    # the control: unrestricted random directions are not orthogonal
    free = torch.nn.functional.normalize(torch.randn(200, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    assert float((free @ clamp.subspace.unit).abs().max()) > 0.3


def test_every_state_is_moved_as_far_and_nothing_moves_along_the_knob() -> None:
    from subspace_probe.diagnostics.knob_controls import orthogonal_clamps

    clamp, states = _knob()
    unit = clamp.subspace.unit
    step = clamp.value - states @ unit
    for other in orthogonal_clamps(clamp, states, 5, seed=1):
        moved = (other.value - states @ other.subspace.unit)[:, None] * other.subspace.unit
        assert torch.allclose(moved.norm(dim=1), step.abs(), atol=1e-4)
        assert float((moved @ unit).abs().max()) < 1e-4
        assert torch.allclose(moved @ other.subspace.unit, step, atol=1e-4)  # the sign of the intent is kept
        assert (other.site or other.subspace.site, other.where) == (clamp.subspace.site, clamp.where)


def test_only_a_direction_set_to_a_value_has_such_controls() -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.diagnostics.knob_controls import orthogonal_clamps

    clamp, states = _knob()
    with pytest.raises(ConfigError, match="exactly a value"):
        orthogonal_clamps(replace(clamp, bound="at_least"), states, 2, seed=0)
