"""Rerouting: laws of half-spaces and moves on generated states, on three backends, and on a planted behaviour."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import linalg, optimize
from torch import Tensor

from tests.models.tiny import batch, text, tiny, words
from tests.planted import activations, planted

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.models.hooked import HookedModel

WIDTH = 32


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _half(d: int = 12, seed: int = 0, **settings: Any) -> "HalfSpace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.targets import HalfSpace

    return HalfSpace(_draw(d, seed=seed), **{"bias": 0.3, "margin": 0.7, "site": Site(1), "where": LAST} | settings)


def _span(k: int, d: int, seed: int, origin: Tensor | None = None) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.linalg.bases import random_subspace

    basis = random_subspace(k, d, seed=seed, dtype=torch.float64)
    origin = torch.zeros(d) if origin is None else origin
    return Subspace(basis, torch.ones(k).double(), origin.double(), site=Site(1))


def _spread(d: int, seed: int = 5) -> Tensor:
    """A covariance far from a multiple of the identity."""
    root = _draw(d, d, seed=seed) * torch.linspace(0.1, 3.0, d).double()
    return root @ root.T


# ---------------------------------------------------------------------------------------------------------- half-spaces
def test_states_outside_end_on_the_margin_by_the_shortest_way_and_others_stay() -> None:
    x, half = 3 * _draw(200, 12, seed=1), _half()
    w = half.normal
    gap = 0.7 - (x @ w + 0.3)
    outside = gap > 0
    assert 20 < int(outside.sum()) < 180
    moved = half.displacement(x)
    assert torch.allclose((x + moved)[outside] @ w + 0.3, torch.full((int(outside.sum()),), 0.7).double(), atol=1e-12)
    assert bool((moved[~outside] == 0).all())
    assert torch.allclose(moved.norm(dim=1), gap.clamp(min=0) / w.norm(), atol=1e-12)
    assert torch.allclose(half.shortfall(x), gap.clamp(min=0), atol=1e-12)
    assert torch.allclose(half.score(x), x @ w + 0.3, atol=1e-12)
    assert float(half.displacement(x + moved).abs().max()) < 1e-12  # again: nothing
    higher = half.with_margin(2.0)
    assert float(higher.displacement(x + moved).norm(dim=1).max()) > 0.1  # control: a set that they are not in


@pytest.mark.parametrize("metric", ["identity", "covariance"])
def test_the_move_is_the_least_one_of_its_metric(metric: str) -> None:
    x, half = _draw(4, 12, seed=2) - 3 * _half().normal, _half()
    covariance = torch.eye(12).double() if metric == "identity" else _spread(12)
    inverse = linalg.inv(covariance.numpy())
    entered = half.with_covariance(covariance)
    w = half.normal.numpy()
    for state, found in zip(x.numpy(), entered.displacement(x).numpy(), strict=True):
        inside = {"type": "ineq", "fun": lambda v, h=state: w @ (h + v) + 0.3 - 0.7, "jac": lambda v: w}
        cost, slope = (lambda v: v @ inverse @ v), (lambda v: 2 * inverse @ v)
        start = found + 0.5 * np.random.default_rng(0).normal(size=12)
        judge = optimize.minimize(cost, start, jac=slope, constraints=[inside], tol=1e-10, options={"maxiter": 500})
        assert judge.success
        assert cost(found) == pytest.approx(judge.fun, rel=1e-6)
        assert w @ (state + found) + 0.3 == pytest.approx(0.7, abs=1e-10)
        shortest = half.displacement(torch.from_numpy(state)[None])[0].numpy()
        if metric == "identity":
            assert np.allclose(found, shortest, atol=1e-12)
        else:
            assert cost(shortest) > 1.1 * cost(found)  # control: the shortest move is another


def test_a_singular_covariance_moves_states_in_its_range_alone() -> None:
    from subspace_probe.core.errors import ShapeError

    half, axes = _half(), linalg.qr(_draw(12, 12, seed=3).numpy())[0]
    inside, outside = torch.from_numpy(axes[:, :4]), torch.from_numpy(axes[:, 4:])
    entered = half.with_covariance(inside @ inside.T)
    moved = entered.displacement(_draw(9, 12, seed=4) - 3 * half.normal)
    assert float((moved @ outside).abs().max()) < 1e-10 < float((moved @ inside).abs().max())
    across = replace(half, normal=outside[:, 0].clone())
    with pytest.raises(ShapeError, match="variance along the normal"):
        across.with_covariance(inside @ inside.T)


def test_a_half_space_of_a_direction_lies_on_the_side_asked_for() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.leace import LEACE
    from subspace_probe.finders.linear_probe import LinearProbe
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.interventions.targets import HalfSpace

    x, labels, _ = planted(400, 8, gap=6.0, shift=20.0)
    acts = activations(x, labels)
    means = [x[labels == value].mean(0) for value in (0, 1)]
    for finder in (MeanDifference(null_draws=0), LinearProbe(null_draws=0), LEACE()):
        found = finder.fit(acts, Site(0))
        for side in (1, -1):
            half = HalfSpace.of(found, side=side)
            assert (half.site, half.where, half.notes["side"]) == (Site(0), acts.where, side)
            right = (half.score(x) > 0) == (labels == (side == 1))
            assert float(right.float().mean()) > 0.9
            assert torch.allclose(half.flipped().score(x), -half.score(x), atol=1e-5)
            moved = x + half.displacement(x)
            assert float(half.score(moved).min()) > -1e-4
            assert float(half.flipped().score(moved).max()) < 1e-4  # control: none of them is on the other side
    direction = MeanDifference(null_draws=0).fit(acts, Site(0))
    half = HalfSpace.of(direction, margin=0.5 * float(direction.scale[0]))
    assert float(half.score(means[1])) == pytest.approx(half.margin, abs=1e-4)  # half the gap: the mean of the class
    assert float(half.score(means[0])) == pytest.approx(-half.margin, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edits_keep_the_dtype_and_pass_gradients(dtype: torch.dtype) -> None:
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.reroute import Reroute

    half = _half()
    move = Move(_span(3, 12, 0), _span(3, 12, 1), _draw(3, 3, seed=2))
    for target in (half, half.with_covariance(_spread(12)), move):
        x = (2 * _draw(6, 12, seed=1)).to(dtype).requires_grad_()
        before = x.detach().clone()
        reroute = Reroute(target, where=half.where)
        for rule in (reroute, reroute.wrong_way()):
            out = rule.edits(3)[half.site].change(x, torch.arange(6))
            assert out.dtype == dtype
            assert torch.equal(x, before)
            assert x.grad is None
            (slope,) = torch.autograd.grad(out.float().sum(), x)
            assert bool(slope.isfinite().all())
            assert bool((slope != 1).any())
    if dtype == torch.float64:  # of the whole map: I - s w' where a state is outside, I elsewhere
        x = 2 * _draw(6, 12, seed=1)
        slope = torch.stack([torch.autograd.functional.jacobian(lambda h: h + half.displacement(h), row) for row in x])
        w, outside = half.normal, half.shortfall(x) > 0
        assert 0 < int(outside.sum()) < 6
        wanted = torch.eye(12).double() - outside[:, None, None] * torch.outer(w, w) / (w @ w)
        assert torch.allclose(slope, wanted, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- moves
@pytest.mark.parametrize("overlap", ["none", "partial", "whole"])
def test_a_move_sets_the_coordinates_in_the_target_whatever_the_spans(overlap: str) -> None:
    from subspace_probe.interventions.moves import Move

    frame = linalg.qr(_draw(10, 10, seed=0).numpy())[0]
    rows = torch.from_numpy(frame.T)
    a = _span(3, 10, 0, origin=_draw(10, seed=1))
    a = replace(a, basis=rows[:3])
    chosen = {"none": rows[3:6], "partial": rows[2:5], "whole": rows[[2, 0, 1]]}[overlap]
    b = replace(a, basis=chosen, origin=_draw(10, seed=2))
    move = Move(a, b, _draw(3, 3, seed=3))
    x = _draw(20, 10, seed=4)
    moved = x + move.displacement(x)
    z = (x - a.origin) @ a.basis.T
    assert torch.allclose((moved - b.origin) @ b.basis.T, z @ move.matrix.T, atol=1e-12)
    both = torch.cat([a.basis, b.basis])
    beside = torch.from_numpy(linalg.null_space(both.numpy()).T)
    assert torch.allclose(moved @ beside.T, x @ beside.T, atol=1e-12)  # outside of both nothing changes
    only_a = torch.from_numpy(linalg.null_space(torch.cat([b.basis, beside]).numpy()).T)
    if len(only_a):  # what was in the source alone is at the source's mean
        assert torch.allclose(moved @ only_a.T, (a.origin @ only_a.T).expand(20, -1), atol=1e-12)
    assert move.subspace.rank == 10 - len(beside)
    assert torch.allclose(move.subspace.reject(moved - x + a.origin), a.origin.expand(20, -1), atol=1e-6)


def test_to_itself_nothing_moves_and_there_and_back_nothing_is_left() -> None:
    from subspace_probe.interventions.moves import Move

    a = _span(3, 10, 0, origin=_draw(10, seed=1))
    b = replace(a, origin=_draw(10, seed=2))
    x, turn = _draw(20, 10, seed=3), torch.from_numpy(linalg.qr(_draw(3, 3, seed=4).numpy())[0])
    assert float(Move(a, a, torch.eye(3).double()).displacement(x).abs().max()) < 1e-12
    there = x + Move(a, b, turn).displacement(x)
    back = there + Move(b, a, turn.T).displacement(there)
    assert torch.allclose(back, x, atol=1e-12)
    assert not torch.allclose(there, x, atol=0.1)  # control
    # a steering step within the subspace, as the difference of means
    shift = Move(a, b, torch.eye(3).double()).displacement(x)
    assert torch.allclose(shift, ((b.origin - a.origin) @ a.basis.T @ a.basis).expand_as(x), atol=1e-12)


def _paired_states(d: int = 10, n: int = 60) -> "tuple[Activations, Subspace, Subspace, Tensor]":
    """States of label 0 whose coordinates in one subspace are, rotated, their partners' in another; rows shuffled."""
    a, b = _span(3, d, 0), _span(3, d, 1)
    turn = torch.from_numpy(linalg.qr(_draw(3, 3, seed=2).numpy())[0])
    z = _draw(n, 3, seed=3) * torch.tensor([1.0, 2.0, 3.0])
    first = z @ a.basis + 7 + _beside(a, n, seed=4)
    second = z @ turn.T @ b.basis - 5 + _beside(b, n, seed=5)
    x = torch.stack([first, second], 1).flatten(0, 1)  # pair i is rows 2 i and 2 i + 1
    return activations(x, torch.arange(2 * n) % 2), a, b, turn


def _beside(subspace: "Subspace", n: int, seed: int) -> Tensor:
    noise = _draw(n, subspace.width, seed=seed)
    return noise - noise @ subspace.basis.T @ subspace.basis


def test_paired_finds_the_planted_rotation_and_moved_states_are_their_partners() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.moves import Move

    acts, a, b, turn = _paired_states()
    order = torch.randperm(acts.rows.n, generator=torch.Generator().manual_seed(0))
    for shown in (acts, acts.take(order), acts.take(order[order != 5])):  # without a partner, row 4 is left out
        move = Move.paired(shown, Site(0), a, b)
        assert torch.allclose(move.matrix.double(), turn, atol=1e-6)
        assert move.notes["correlation"] == pytest.approx(1.0, abs=1e-9)
        assert (move.site, move.where) == (Site(0), acts.where)
    assert move.notes["pairs"] == 59
    x = acts.at(Site(0))
    moved = x[::2] + Move.paired(acts, Site(0), a, b).displacement(x[::2])
    assert torch.allclose(moved @ b.basis.T, x[1::2] @ b.basis.T, atol=1e-4)
    assert not torch.allclose(x[::2] @ b.basis.T, x[1::2] @ b.basis.T, atol=1.0)  # control
    back = Move.paired(acts, Site(0), b, a, label=1)
    assert torch.allclose(back.matrix.double(), turn.T, atol=1e-6)
    others = tuple((i // 2 + i % 2) % 60 for i in range(120))  # control: everybody with the next one's partner
    astray = Move.paired(replace(acts, contrast=replace(acts.contrast, pairs=others)), Site(0), a, b)
    assert astray.notes["correlation"] < 0.5
    assert not torch.allclose(astray.matrix.double(), turn, atol=0.3)


def _two_clouds(n: int = 300, d: int = 6, seed: int = 0) -> Tensor:
    first = _draw(n, d, seed=seed) @ _draw(d, d, seed=seed + 1) + 4
    second = _draw(n, d, seed=seed + 2) @ _draw(d, d, seed=seed + 3) - 3
    return torch.stack([first, second], 1).flatten(0, 1)


def test_transport_of_whole_states_gives_them_the_moments_of_the_others() -> None:
    from sklearn.covariance import oas

    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.moves import Move

    x = _two_clouds()
    acts = activations(x, torch.arange(len(x)) % 2)
    move = Move.transport(acts, Site(0), shrinkage=0.0)
    moved, wanted = x[::2] + move.displacement(x[::2]), x[1::2]
    assert torch.allclose(moved.mean(0), wanted.mean(0), atol=1e-5)
    assert torch.allclose(torch.cov(moved.T), torch.cov(wanted.T), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cov(x[::2].T), torch.cov(wanted.T), atol=0.5)  # control
    s, c = (torch.cov(part.T).numpy() for part in (x[::2], wanted))
    root = linalg.sqrtm(s)
    judge = linalg.inv(root) @ linalg.sqrtm(root @ c @ root) @ linalg.inv(root)
    assert np.allclose(move.matrix.numpy(), judge, atol=1e-4)
    assert move.subspace.rank == 6
    shrunk = Move.transport(acts, Site(0)).matrix.double().numpy()
    s, c = (
        oas(part.numpy())[0] * len(part) / (len(part) - 1) for part in (x[::2], wanted)
    )  # scikit-learn divides by n
    assert np.allclose(shrunk @ s @ shrunk, c, rtol=1e-4, atol=1e-4)
    assert not np.allclose(shrunk, judge, atol=0.1)


def test_transport_within_a_subspace_matches_there_and_touches_nothing_else() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.moves import Move
    from subspace_probe.linalg.moments import Moments

    x = _two_clouds()
    acts, labels, inside = activations(x, torch.arange(len(x)) % 2), torch.arange(len(x)) % 2, _span(2, 6, 7)
    move = Move.transport(acts, Site(0), inside, label=1, shrinkage=0.0)
    start, end = x[labels == 1], x[labels == 0]
    moved = start + move.displacement(start)
    z, y, raw = (part @ inside.basis.T for part in (moved, end, start))
    assert torch.allclose(z.mean(0), y.mean(0), atol=1e-5)
    assert torch.allclose(torch.cov(z.T), torch.cov(y.T), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cov(raw.T), torch.cov(y.T), atol=0.1)  # control
    assert torch.allclose(inside.reject(moved), inside.reject(start), atol=1e-6)
    line = _span(1, 6, 8)
    in_one = Move.transport(acts, Site(0), line, shrinkage=0.0)
    ratio = (start @ line.basis[0]).std() / (end @ line.basis[0]).std()
    assert float(in_one.matrix) == pytest.approx(float(ratio), rel=1e-5)
    half = len(end) // 2  # moments from two workers
    streamed = Moments.empty(6).update(end[:half]).merge(Moments.empty(6).update(end[half:]))
    same = Move.of_moments(Moments.empty(6).update(start), streamed, inside, shrinkage=0.0)
    assert torch.allclose(same.displacement(start), move.displacement(start), atol=1e-5)


def test_transport_with_fewer_rows_than_dimensions_takes_shrinkage() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.moves import Move

    x = _draw(12, 30, seed=0)
    acts = activations(x, torch.arange(12) % 2)
    assert bool(Move.transport(acts, Site(0)).displacement(x).isfinite().all())
    with pytest.raises(ConfigError, match="rank 5 in 30 dimensions"):
        Move.transport(acts, Site(0), shrinkage=0.0)
    with pytest.raises(ConfigError, match="alpha=2"):
        Move.transport(acts, Site(0), shrinkage=2.0)


# ------------------------------------------------------------------------------------------------------------- controls
def _targets(d: int = 12) -> "list[HalfSpace | Move]":
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.moves import Move

    a, b = (replace(_span(2, d, seed, origin=_draw(d, seed=9 + seed)), where=LAST) for seed in (0, 1))
    within = Move(a, replace(a, origin=b.origin), _draw(2, 2, seed=3))
    return [_half(d), _half(d).with_covariance(_spread(d)), within, Move(a, b, _draw(2, 2, seed=3))]


def test_controls_move_every_state_as_far_along_another_subspace() -> None:
    from subspace_probe.diagnostics.random_controls import random_like
    from subspace_probe.interventions.reroute import Reroute

    x = 3 * _draw(50, 12, seed=1)

    def moved(reroute: "Reroute") -> Tensor:
        (edit,) = reroute.edits(3).values()
        return edit.change(x, torch.arange(50)) - x

    for target, rank in zip(_targets(), (1, 1, 2, 4), strict=True):
        reroute = Reroute(target)
        assert reroute.subspace.rank == rank
        real, other = moved(reroute), reroute.with_subspace(random_like(reroute.subspace, seed=11))
        assert torch.allclose(moved(other).norm(dim=1), real.norm(dim=1), atol=1e-5)
        inside = moved(other) @ other.subspace.basis.double().T @ other.subspace.basis.double()
        assert torch.allclose(inside, moved(other), atol=1e-5)
        assert float((moved(other) - real).norm(dim=1).max()) > 0.1
        assert torch.allclose(moved(reroute.wrong_way()), -real, atol=1e-5)
        assert torch.allclose(moved(reroute.wrong_way().wrong_way()), real, atol=1e-5)
        assert torch.allclose(moved(other.with_subspace(reroute.subspace)), real, atol=1e-5)


def test_bad_settings_are_refused() -> None:
    from subspace_probe.core.errors import (
        ConfigError,
        DataError,
        PositionError,
        RankError,
        ShapeError,
        SiteError,
        StaleStore,
    )
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.interventions.targets import HalfSpace

    acts, a, b, _ = _paired_states()
    stale = replace(acts, notes={"fingerprint": "x" * 64})
    alone = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(120))))
    crowded = replace(acts, contrast=replace(acts.contrast, pairs=tuple(i // 4 for i in range(120))))
    oblique = replace(_span(1, 12, 0), reader=_span(1, 12, 0).basis + 0.3 * _beside(_span(1, 12, 0), 1, seed=1))
    cases: list[tuple[type[Exception], str, Any]] = [
        (SiteError, "does not say where", lambda: Reroute(_half(site=None))),
        (PositionError, "at which tokens", lambda: Reroute(_half(where=None))),
        (RankError, "in 1 dimensions", lambda: Reroute(_half()).with_subspace(_span(2, 12, 0))),
        (ShapeError, "zero or not finite", lambda: HalfSpace(torch.zeros(3))),
        (ShapeError, "zero or not finite", lambda: HalfSpace(torch.tensor([1.0, math.nan]))),
        (ConfigError, "finite numbers", lambda: _half(margin=math.inf)),
        (ShapeError, "must raise it by 1", lambda: _half(step=_draw(12, seed=3))),
        (ShapeError, "width 12", lambda: _half().score(torch.zeros(2, 5))),
        (ShapeError, r"shape \(5, 5\)", lambda: _half().with_covariance(torch.eye(5))),
        (RankError, "rank 2", lambda: HalfSpace.of(_span(2, 12, 0))),
        (ConfigError, "side=0", lambda: HalfSpace.of(_span(1, 12, 0), side=0)),
        (RankError, "rank 2 to rank 3", lambda: Move(_span(2, 9, 0), _span(3, 9, 0), torch.eye(2))),
        (RankError, "rank 3 to rank 2", lambda: Move.paired(acts, Site(0), a, _span(2, 10, 0))),
        (ShapeError, "not finite", lambda: Move(_span(1, 9, 0), _span(1, 9, 1), torch.full((1, 1), math.nan))),
        (ConfigError, "reader of its own", lambda: Move(oblique, oblique, torch.eye(1))),
        (ShapeError, "width", lambda: Move.paired(acts, Site(0), _span(3, 9, 0))),
        (DataError, "No pair has", lambda: Move.paired(alone, Site(0), a, b)),
        (DataError, "several rows of one label", lambda: Move.paired(crowded, Site(0), a, b)),
        (DataError, "2 pairs in 3", lambda: Move.paired(acts.take(torch.arange(4)), Site(0), a, b)),
        (DataError, "two rows of each", lambda: Move.transport(acts.select(label=0), Site(0), a)),
        (
            StaleStore,
            "another model",
            lambda: Move.paired(stale, Site(0), replace(a, notes={"fingerprint": "y" * 64})),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_fields_are_plain() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import Where
    from subspace_probe.interventions.reroute import Reroute

    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            for item in value.values():
                check(item)
        elif isinstance(value, tuple | list):
            for item in value:
                check(item)
        elif is_dataclass(value) and not isinstance(value, Site | Where):
            for part in fields(value):
                check(getattr(value, part.name))
        else:
            assert isinstance(value, str | int | float | Tensor | Site | Where | None), value

    for target in _targets():
        check(Reroute(target).wrong_way())


# -------------------------------------------------------------------------------------------------------------- a model
@pytest.mark.parametrize("backend", ["native", "transformer_lens", "nnsight"])
def test_states_read_back_at_the_site_are_where_they_should_be(backend: str) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.models import BACKENDS

    model, shown, site = BACKENDS.load(backend)(tiny("llama"), name="llama"), batch(5, 9, 7), Site(1)
    clean = model.run(shown, reads=[site]).reads[site]
    last = clean[:, -1]
    # the middle prompt is inside already
    half = _half(WIDTH)
    normal = half.normal.float()
    half = replace(half, normal=normal, bias=-float((last @ normal).sort().values[1]), margin=-1e-3)
    scores = half.score(last)
    edited = model.run(shown, reads=[site], writes=Reroute(half).edits(3)).reads[site]
    wanted = torch.maximum(scores, torch.tensor(half.margin))
    assert torch.allclose(half.score(edited[:, -1]), wanted, atol=1e-4)
    assert float((wanted - scores).max()) > 0.1  # control: somebody had to move
    assert torch.equal(edited[:, :-1], clean[:, :-1])
    a, b = (replace(_span(2, WIDTH, seed, origin=_draw(WIDTH, seed=seed)), where=LAST) for seed in (0, 1))
    move = Move(a, b, _draw(2, 2, seed=3))
    edited = model.run(shown, reads=[site], writes=Reroute(move).edits(3)).reads[site]
    z = (last.double() - a.origin) @ a.basis.T
    assert torch.allclose((edited[:, -1].double() - b.origin) @ b.basis.T, z @ move.matrix.T, atol=1e-4)
    assert torch.equal(edited[:, :-1], clean[:, :-1])


def test_a_target_of_another_width_or_model_is_refused_before_anything_runs() -> None:
    from subspace_probe.core.errors import ShapeError, StaleStore
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.models import BACKENDS
    from subspace_probe.models.hooked import HookedModel

    model = HookedModel(BACKENDS.load("native")(tiny("llama"), name="llama"), words())
    prompts = [text(5, 0)]
    clean = model.logits(prompts)
    for target in _targets(16):
        with pytest.raises(ShapeError, match="of width 16 was used"):
            model.logits(prompts, interventions=[Reroute(target)])
    half, *_, move = _targets(WIDTH)
    stale = {"fingerprint": "0" * 64}
    for target in (replace(half, notes=stale), replace(move, target=replace(move.target, notes=stale))):
        with pytest.raises(StaleStore, match="000000000000"):
            model.logits(prompts, interventions=[Reroute(target)])
    with pytest.raises(ShapeError, match="of width 16 was used"):
        model.logits(prompts, interventions=[replace(Reroute(half), along=_span(1, 16, 0))])
    assert torch.equal(model.logits(prompts), clean)
    assert not torch.allclose(model.logits(prompts, interventions=[Reroute(move)]), clean, atol=1e-3)  # control


@pytest.fixture(scope="module")
def refusing(chat: "HookedModel") -> "tuple[Activations, Any, Any]":
    """States that decide between refusing and complying, their direction, and held-out prompts of both kinds."""
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.organisms import load_truth, organism_contrast

    (place,) = (found for found in load_truth("chat").variables if found.name == "refusal")
    train, test = (
        organism_contrast("chat/requests", split=split, n=n).relabel("refused")
        for split, n in (("train", 100), ("test", 60))
    )
    acts = chat.capture(train, sites=place.site, where=place.where)
    return acts, MeanDifference(null_draws=0).fit(acts, place.site), test


@pytest.mark.parametrize("label", [0, 1])
def test_rerouting_at_its_planted_site_flips_a_refusal_and_controls_do_not(chat, refusing, label: int) -> None:
    """From complying (0) to refusing and back, by each kind of target; none of the controls flips anything."""
    from subspace_probe.diagnostics.random_controls import random_like
    from subspace_probe.interventions.conditions import outcomes
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.linalg.moments import class_moments
    from subspace_probe.linalg.shrinkage import oas
    from subspace_probe.metrics.behaviour import refusal_score

    acts, direction, test = refusing
    site, side = direction.site, 1 - 2 * label
    half = HalfSpace.of(direction, side=side, margin=0.5 * float(direction.scale[0]))
    seen = class_moments(acts.batches(site), 128, second=True)
    every = seen[0].merge(seen[1])
    covariance, _ = oas(every.covariance(), every.n)
    targets = [half, half.with_covariance(covariance), Move.transport(acts, site, direction, label=label)]
    reroutes = [Reroute(target) for target in targets]
    randoms = [
        reroute.with_subspace(random_like(reroute.subspace, seed=seed)) for reroute in reroutes for seed in (0, 1)
    ]
    wrong = [reroute.wrong_way() for reroute in reroutes[:1]]
    prompts = [prompt for prompt, y in zip(test.prompts, test.labels, strict=True) if y == label]
    (score,) = outcomes(chat, prompts, [None, *reroutes, *randoms, *wrong], [refusal_score(chat)])
    flipped = ((score > 0).long() != label).double().mean(1)
    assert len(prompts) >= 20
    assert float(flipped[0]) <= 0.05  # what the model does by itself
    assert float(flipped[1 : 1 + len(reroutes)].min()) >= 0.95
    assert float(flipped[1 + len(reroutes) :].max()) <= 0.05


@pytest.mark.slow
def test_a_set_of_edits_survives_a_batch_of_ragged_prompts_while_generating(chat, refusing) -> None:
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.reroute import Reroute
    from subspace_probe.interventions.targets import HalfSpace

    _, direction, test = refusing
    half = HalfSpace.of(direction, margin=float(direction.scale[0]))
    for where in (None, ALL):
        reroute = Reroute(half) if where is None else Reroute(half, where=where)
        together, alone, uncached = (
            chat.generate(test.prompts[:4], interventions=[reroute], max_new_tokens=4),
            [chat.generate([one], interventions=[reroute], max_new_tokens=4)[0] for one in test.prompts[:4]],
            chat.generate(test.prompts[:4], interventions=[reroute], max_new_tokens=4, use_cache=False),
        )
        assert together == alone == uncached
        assert together != chat.generate(test.prompts[:4], max_new_tokens=4)  # control
