"""Laws of the bottom floor that hold for any data: hypothesis looks for the exception."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_probe.linalg import (
    Moments,
    auroc,
    complement,
    coords,
    lift,
    orthonormalise,
    overlap,
    principal_angles,
    project,
    random_subspace,
    reject,
)

laws = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A basis, rows and an origin of one width, over twelve orders of magnitude."""
    d = draw(st.integers(1, 12))
    basis = random_subspace(draw(st.integers(1, d)), d, seed=draw(seeds), dtype=torch.float64)
    scale = 10.0 ** draw(st.integers(-6, 6))
    return basis, scale * normal(5, d, seed=draw(seeds)), scale * normal(d, seed=draw(seeds))


def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-11 * float(scale.abs().max())


@laws
@given(spaces())
def test_projection_is_idempotent_and_self_adjoint(space: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    basis, x, origin = space
    once = project(x, basis)
    assert close(project(once, basis), once, x)
    assert close(reject(reject(x, basis, origin), basis, origin), reject(x, basis, origin), x.abs() + origin.abs())
    assert close(once @ x.T, x @ once.T, x @ x.T)  # <Px, y> = <x, Py>


@laws
@given(spaces())
def test_inside_plus_outside_is_everything(space: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    basis, x, origin = space
    assert close(project(x, basis) + reject(x, basis), x, x)
    assert close(project(x, basis, origin) + reject(x, basis, origin), x, x.abs() + origin.abs())
    assert close(lift(coords(x, basis), basis), project(x, basis), x)
    assert close(project(x, complement(basis)), reject(x, basis), x) if len(basis) < basis.shape[1] else True


@laws
@given(spaces(), seeds)
def test_projection_does_not_depend_on_the_basis_of_the_subspace(
    space: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> None:
    basis, x, _ = space
    turned = random_subspace(len(basis), len(basis), seed=seed, dtype=torch.float64) @ basis
    assert close(project(x, turned), project(x, basis), x)
    assert close(orthonormalise(basis), basis, torch.ones(1))  # an orthonormal basis is kept, order and signs


@laws
@given(st.integers(2, 12), st.data())
def test_overlap_is_symmetric_rotation_invariant_and_between_0_and_1(d: int, data: st.DataObject) -> None:
    a = random_subspace(data.draw(st.integers(1, d)), d, seed=data.draw(seeds), dtype=torch.float64)
    b = random_subspace(data.draw(st.integers(1, d)), d, seed=data.draw(seeds), dtype=torch.float64)
    turn = random_subspace(d, d, seed=data.draw(seeds), dtype=torch.float64)
    value = overlap(a, b)
    assert 0.0 <= value <= 1.0
    assert abs(overlap(b, a) - value) < 1e-12
    assert abs(overlap(a @ turn, b @ turn) - value) < 1e-12
    assert abs(float(principal_angles(a, b).cos().square().mean()) - value) < 1e-12
    assert abs(overlap(a, a) - 1.0) < 1e-12


def same(a: Moments, b: Moments) -> bool:
    assert a.scatter is not None
    assert b.scatter is not None
    spread = 1.0 + float(a.scatter.abs().max())
    return (
        a.n == b.n
        and torch.allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12)
        and float((a.scatter - b.scatter).abs().max()) <= 1e-10 * spread
    )


@laws
@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.floats(-1e4, 1e4), seeds)
def test_moments_merge_is_associative_and_order_free(sizes: list[int], mean: float, seed: int) -> None:
    rows = normal(sum(sizes), 4, seed=seed) + mean
    a, b, c = (Moments.empty(4).update(part) for part in rows.split(sizes))
    whole = Moments.empty(4).update(rows)
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), whole)
    assert same(Moments.empty(4).merge(a), a)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    assert same(Moments.empty(4).update(shuffled), whole)


@laws
@given(st.lists(st.integers(-3, 3), min_size=4, max_size=20), seeds)
def test_auroc_sees_order_only(levels: list[int], seed: int) -> None:
    scores = torch.tensor(levels, dtype=torch.float64)
    labels = torch.arange(len(levels)) % 2
    value = auroc(scores, labels)
    assert auroc(scores.exp() * 7 - 2, labels) == value
    assert abs(auroc(scores, 1 - labels) - (1 - value)) < 1e-12
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))
    assert abs(auroc(scores[order], labels[order]) - value) < 1e-12
