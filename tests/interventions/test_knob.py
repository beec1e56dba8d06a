"""The algebra of clamping, on random states."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.interventions.test_steer import D, apply, real, states, subspace


def coords(x: torch.Tensor, chosen: Any) -> torch.Tensor:
    return torch.einsum("bpd,kd->bpk", x, chosen.readers)


def test_the_coordinates_are_the_values_and_nothing_else_moves() -> None:
    from subspace_probe.interventions.knob import KnobClamp

    x = states()
    for rank, value in ((1, 2.5), (3, (2.5, -1.0, 0.0)), (3, torch.tensor([2.5, -1.0, 0.0]))):
        chosen = subspace(rank, origin=torch.ones(D))  # counted from zero, wherever the origin is
        found = apply(KnobClamp(chosen, value), x)
        wanted = torch.as_tensor(value).expand(len(x[real()]), rank)
        assert torch.allclose(coords(found, chosen)[real()], wanted, atol=1e-5)
        outside = torch.eye(D) - chosen.basis.T @ chosen.basis
        assert torch.allclose(found @ outside, x @ outside, atol=1e-5)
        assert torch.allclose(apply(KnobClamp(chosen, value), found), found, atol=1e-5)  # twice is once
        assert torch.equal(found[~real()], x[~real()])
        assert float((coords(x, chosen)[real()] - wanted).abs().min()) > 1e-3  # a control: it was not there before


def test_the_sign_of_a_knob_is_arbitrary() -> None:
    from subspace_probe.interventions.knob import KnobClamp

    chosen, x = subspace(), states()
    assert torch.allclose(apply(KnobClamp(chosen, 2.5), x), apply(KnobClamp(-chosen, -2.5), x), atol=1e-6)
    assert not torch.allclose(apply(KnobClamp(chosen, 2.5), x), apply(KnobClamp(-chosen, 2.5), x), atol=0.1)
    low, high = KnobClamp(chosen, 0.3, bound="at_least"), KnobClamp(-chosen, -0.3, bound="at_most")
    assert torch.allclose(apply(low, x), apply(high, x), atol=1e-6)


def test_bounds_move_only_what_lies_beyond_them() -> None:
    from subspace_probe.interventions.knob import KnobClamp

    chosen, x = subspace(2), states()
    before = coords(x, chosen)
    for bound, wanted in (("at_least", before.clamp(min=0.2)), ("at_most", before.clamp(max=0.2))):
        found = apply(KnobClamp(chosen, (0.2, 0.2), bound=bound), x)
        assert torch.allclose(coords(found, chosen)[real()], wanted[real()], atol=1e-5)
        moved = (wanted - before).abs().amax(-1) > 0
        assert 0 < int(moved[real()].sum()) < int(real().sum())
        assert torch.equal(found[real() & ~moved], x[real() & ~moved])


def test_each_prompt_has_its_own_values() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.interventions.knob import KnobClamp

    x, order = states(), torch.tensor([1, 0])
    found = apply(KnobClamp(subspace(), (4.0, -4.0)), x, order)
    assert torch.allclose(coords(found, subspace())[0], torch.tensor(-4.0), atol=1e-5)
    assert torch.allclose(coords(found, subspace())[1, 2:], torch.tensor(4.0), atol=1e-5)
    several = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = apply(KnobClamp(subspace(2), several), x, order)
    assert torch.allclose(coords(found, subspace(2))[0], several[1].expand(5, 2), atol=1e-5)
    for value, rank in (((4.0,), 1), (several[:1], 2)):
        with pytest.raises(DataError, match="values for 1 prompts, but the call has a prompt number 1"):
            apply(KnobClamp(subspace(rank), value), x, order)


def test_a_value_by_intent() -> None:
    from subspace_probe.core.errors import ConfigError, UnknownName
    from subspace_probe.interventions.knob import KnobClamp

    knob, x = KnobClamp(subspace(), values={"context": 6.0, "prior": -6.0}), states()
    assert torch.equal(apply(knob.to("prior"), x), apply(KnobClamp(subspace(), -6.0), x))
    assert torch.equal(apply(knob.to("prior").to("context"), x), apply(KnobClamp(subspace(), 6.0), x))
    with pytest.raises(UnknownName, match="Did you mean 'context'"):
        knob.to("contxt")
    with pytest.raises(ConfigError, match=r"Choose an intent: clamp.to\('context'\)"):
        knob.edits(4)


def test_an_oblique_subspace_is_read_by_its_reader() -> None:
    from subspace_probe.interventions.knob import KnobClamp

    plain = subspace(2)
    drawn = torch.randn(2, D, generator=torch.Generator().manual_seed(5))
    tilted = plain.basis + drawn - (drawn @ plain.basis.T) @ plain.basis
    oblique, x = replace(plain, reader=tilted), states()
    found = apply(KnobClamp(oblique, (1.0, 2.0)), x)
    assert torch.allclose((found @ tilted.T)[real()], torch.tensor([1.0, 2.0]).expand(8, 2), atol=1e-4)
    assert not torch.allclose((found @ plain.basis.T)[real()], torch.tensor([1.0, 2.0]).expand(8, 2), atol=0.1)


def test_the_published_tokens_are_the_last_of_every_pass(chat: Any) -> None:
    from subspace_probe.core.tokens import LAST, after

    shown = chat.tokens(["please wash the stone", "i need to dry this rice soon"])
    published = after(LAST.offset(-1))
    assert torch.equal(shown.select(published, shown.positions) & shown.mask, shown.select(LAST, shown.positions))
    assert bool(shown.select(published, shown.lengths[:, None] + torch.arange(3)).all())


def test_half_precision_is_rounded_once() -> None:
    from subspace_probe.interventions.knob import KnobClamp

    x = states(dtype=torch.bfloat16)
    found = apply(KnobClamp(subspace(), 2.5), x)
    assert found.dtype == torch.bfloat16
    exact = apply(KnobClamp(subspace(), 2.5), x.float())
    assert torch.equal(found, exact.bfloat16())


def test_values_that_do_not_fit_are_refused() -> None:
    from subspace_probe.core.errors import ConfigError, ShapeError, SiteError
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.knob import KnobClamp

    for value in (math.nan, (1.0, math.inf)):
        with pytest.raises(ShapeError, match="not finite"):
            KnobClamp(subspace(), value)
    for value in (1.0, (1.0, 2.0), torch.ones(2, 2)):
        with pytest.raises(ShapeError, match="for a subspace of rank 3"):
            KnobClamp(subspace(3), value)
    with pytest.raises(ShapeError, match="for a subspace of rank 3"):
        KnobClamp(subspace(3), values={"context": (1.0, 2.0)})
    with pytest.raises(ConfigError, match="without a value"):
        KnobClamp(subspace())
    with pytest.raises(SiteError, match="does not say where"):
        KnobClamp(Subspace.span(torch.ones(D)), 1.0)
