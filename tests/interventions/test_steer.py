"""Steering against its own formulas, on random states."""

import math
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor

from tests.models.tiny import batch

if TYPE_CHECKING:
    from subspace_probe.core.subspaces import Subspace

D = 12


def subspace(rank: int = 1, seed: int = 0, **fields: Any) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    generator = torch.Generator().manual_seed(seed)
    return Subspace.span(3 * torch.randn(rank, D, generator=generator), site=Site(1), **fields)


def states(rows: int = 2, pos: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, pos, D, generator=torch.Generator().manual_seed(9)).to(dtype)


def apply(intervention: Any, x: Tensor, index: Tensor | None = None) -> Tensor:
    """The one edit of an intervention, on prompts of five and three tokens."""
    from dataclasses import replace

    from subspace_probe.core.edits import EditContext

    shown = batch(5, 3)
    shown = shown if index is None else replace(shown, index=index)
    (edit,) = intervention.edits(4).values()
    return edit(x, EditContext(shown, shown.positions, shown.mask))


def real() -> Tensor:
    return batch(5, 3).mask


def test_units_are_their_formulas() -> None:
    from subspace_probe.interventions.steer import Steer

    x = states()
    for rank in (1, 3):
        chosen = subspace(rank)
        natural = sum(chosen.scale[i] * chosen.basis[i] for i in range(rank))
        unit = natural / natural.norm()
        norms = x.square().sum(-1, keepdim=True).sqrt()
        wanted = {"scale": x - 1.5 * natural, "raw": x - 1.5 * unit, "norm": x - 1.5 * norms * unit}
        for name, moved in wanted.items():
            found = apply(Steer(chosen, -1.5, unit=name), x)
            assert torch.allclose(found[real()], moved[real()], atol=1e-5)
            assert torch.equal(found[~real()], x[~real()])
        assert not torch.allclose(wanted["scale"], wanted["raw"], atol=0.1)  # a control: the units do differ


def test_a_unit_says_how_far_and_not_whereto() -> None:
    from subspace_probe.interventions.steer import Steer

    chosen, x = subspace(3), states()
    length = float((chosen.scale[:, None] * chosen.basis).sum(0).norm())
    scaled, raw = apply(Steer(chosen, 2.0), x), apply(Steer(chosen, 2.0 * length, unit="raw"), x)
    assert torch.allclose(scaled, raw, atol=1e-4)


def test_the_default_is_bitwise_what_it_was() -> None:
    from subspace_probe.interventions.steer import Steer

    chosen, x = subspace(), states()
    assert torch.equal(apply(Steer(chosen, 2.0), x)[real()], (x + 2.0 * chosen.vector)[real()])


def test_a_kept_norm_is_kept_and_only_the_direction_turns() -> None:
    from subspace_probe.interventions.steer import Steer

    x, steer = states(), Steer(subspace(), 2.0, keep_norm=True)
    kept, plain = apply(steer, x)[real()], apply(Steer(subspace(), 2.0), x)[real()]
    assert torch.allclose(kept.norm(dim=-1), x[real()].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(kept, plain, dim=-1), torch.ones(len(kept)), atol=1e-6)
    assert float((plain.norm(dim=-1) / x[real()].norm(dim=-1) - 1).abs().min()) > 1e-2  # a control
    zero = apply(steer, torch.zeros_like(x))
    assert not bool(zero.isnan().any())
    assert torch.equal(zero, torch.zeros_like(x))  # of a state without length nothing can be turned


@pytest.mark.parametrize("options", [{}, {"unit": "norm"}, {"unit": "raw"}, {"keep_norm": True}])
def test_no_strength_is_nothing_to_the_bit(options: dict[str, Any]) -> None:
    from subspace_probe.interventions.steer import Steer

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = states(dtype=dtype)
        assert torch.equal(apply(Steer(subspace(), 0.0, **options), x), x)
        moved = apply(Steer(subspace(), 0.5, **options), x)
        assert moved.dtype == dtype
        assert not torch.equal(moved, x)


def test_steering_and_its_negative_is_nothing_and_order_is_no_matter() -> None:
    from subspace_probe.core.edits import compose
    from subspace_probe.interventions.steer import Steer

    steers = [
        Steer(subspace(seed=seed), 1.0 - seed, unit=unit) for seed, unit in ((0, "scale"), (2, "raw"), (3, "raw"))
    ]

    class Several:
        def __init__(self, *parts: Steer) -> None:
            self.parts = parts

        def edits(self, n_layers: int) -> Any:
            return compose(*(part.edits(n_layers) for part in self.parts))

    x = states()
    forth, back = apply(Several(*steers), x), apply(Several(*reversed(steers)), x)
    assert torch.allclose(forth, back, atol=1e-5)
    added = x + sum(apply(steer, x) - x for steer in steers)
    assert torch.allclose(forth, added, atol=1e-5)
    undone = apply(Several(*steers, *(steer.scaled(-1.0) for steer in steers)), x)
    assert torch.allclose(undone, x, atol=1e-5)
    assert not torch.allclose(forth, x, atol=0.1)  # a control
    # a share of the norm is one of the state that is found: there the order does matter
    share = Steer(subspace(seed=4), 1.0, unit="norm")
    assert not torch.allclose(apply(Several(steers[0], share), x), apply(Several(share, steers[0]), x), atol=1e-2)


def test_every_prompt_of_the_call_has_its_own_strength() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.interventions.steer import Steer

    chosen, x = subspace(), states()
    for given in ((0.5, -2.0, 7.0), [0.5, -2.0, 7.0], torch.tensor([0.5, -2.0, 7.0])):
        steer = Steer(chosen, given)
        assert steer.strength == (0.5, -2.0, 7.0)
        found = apply(steer, x, torch.tensor([2, 0]))  # rows of a batch are in any order
        assert torch.allclose(found[0], x[0] + 7.0 * chosen.vector, atol=1e-5)
        assert torch.allclose(found[1][2:], (x[1] + 0.5 * chosen.vector)[2:], atol=1e-5)
    with pytest.raises(DataError, match="strengths for 3 prompts, but the call has a prompt number 3"):
        apply(Steer(chosen, (1.0, 2.0, 3.0)), x, torch.tensor([0, 3]))
    assert Steer(chosen, (1.0, -2.0)).scaled(-2.0).strength == (-2.0, 4.0)
    assert Steer(chosen, (1.0, -2.0)).size == 2.0


def test_gradients_flow_through() -> None:
    """Along the change of the state, against the central difference."""
    from subspace_probe.interventions.steer import Steer

    x, step = states(dtype=torch.float64), 1e-5 * torch.randn(2, 5, D, dtype=torch.float64)
    for options in ({}, {"unit": "norm"}, {"keep_norm": True}):
        steer, start = Steer(subspace(), 0.7, **options), x.clone().requires_grad_()
        weights = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).cos()
        (gradient,) = torch.autograd.grad((weights * apply(steer, start)).sum(), start)
        wanted = (weights * (apply(steer, x + step) - apply(steer, x - step))).sum() / 2
        assert float((gradient * step).sum()) == pytest.approx(float(wanted), rel=1e-5)


def test_what_cannot_be_honoured_is_refused() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.steer import Steer

    for strength in (math.nan, math.inf, (1.0, math.nan), torch.tensor([1.0, -math.inf]), ()):
        with pytest.raises(ConfigError, match="finite number"):
            Steer(subspace(), strength)
    with pytest.raises(Exception, match="norms"):  # the shape checker of the tests may be the first to see it
        Steer(subspace(), unit=cast("Any", "norms"))
    weights = subspace(scale_unit="weight")
    with pytest.raises(ConfigError, match="in units of weight"):
        Steer(weights)
    for unit in ("norm", "raw"):
        assert Steer(weights, unit=unit).edits(4)


def test_its_name_says_everything() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import GENERATED
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    assert repr(Steer(subspace(), 2.0)) == "Steer(+2 at L1.resid_post, all)"
    told = repr(Steer(subspace(), 0.25, Site(2), GENERATED, "norm", True, Score(subspace())))
    assert told.startswith(
        "Steer(+0.25 shares of each state's norm at L2.resid_post, generated, norm kept, when Score(score >= 0 at L1"
    )
    assert "-1 to +3 by prompt" in repr(Steer(subspace(), (-1.0, 3.0)))


def test_a_copy_keeps_all_that_is_not_changed() -> None:
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    steer = Steer(subspace(), 2.0, where=LAST, unit="raw", keep_norm=True, when=Score(subspace(seed=1)))
    other = steer.with_subspace(subspace(seed=2)).with_strength(3.0)
    assert (other.where, other.unit, other.keep_norm, other.when) == (LAST, "raw", True, steer.when)
    assert other.strength == 3.0
    assert [site.short for site in other.edits(4)] == ["L1.resid_post"]
