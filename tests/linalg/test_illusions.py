"""The closed forms of the illusion checks against eigenvalues, quadrature, sampling and other libraries."""

import inspect

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from torch import Tensor

from subspace_probe.linalg.angles import overlap
from subspace_probe.linalg.bases import random_directions, random_subspace
from subspace_probe.linalg.illusions import (
    bisector,
    capacity,
    linearised_optimum,
    random_direction_moments,
    row_space,
    split_by_row_space,
    visible_fraction_moments,
    visible_fraction_quantile,
)

TOY = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def effect(v: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """(v.D)(v.G), row by row."""
    return (v * d).sum(-1) * (v * g).sum(-1)


# ---------------------------------------------------------------------------------------------- what a patch can do
def test_the_best_direction_of_one_pair_is_the_bisector() -> None:
    d, g = normal(40, 7), 3 * normal(40, 7, seed=1)
    values = torch.linalg.eigvalsh((d[:, :, None] * g[:, None, :] + g[:, :, None] * d[:, None, :]) / 2)
    best, v = values[:, -1], bisector(d, g)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(effect(v, d, g), best)
    torch.testing.assert_close(capacity(d, g), best - (d * g).sum(1))
    torch.testing.assert_close(values[:, 0], ((d * g).sum(1) - d.norm(dim=1) * g.norm(dim=1)) / 2)
    uneven = torch.nn.functional.normalize(d + g, dim=1)  # control: without giving both the same length
    assert bool((effect(uneven, d, g) < best - 1e-6).all())


def test_the_toy_has_the_known_spectrum() -> None:
    """D = (1, 0, 1) and G = (0, 2, 1): eigenvalues (1 +- sqrt 10) / 2 and 0, and 1.0 within the first two neurons."""
    d, g = TOY
    values, basis = linearised_optimum(d, g, 3)
    assert values.tolist() == pytest.approx(
        [(1 + 10**0.5) / 2], abs=1e-12
    )  # 2.0811; the others take away or do nothing
    torch.testing.assert_close(basis[0] * basis[0, 0].sign(), bisector(d, g)[0])
    assert float(effect(bisector(d, g), d, g)) == pytest.approx(2.0811, abs=5e-5)
    inside = d[:, :2], g[:, :2]
    assert float(capacity(*inside)) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(bisector(*inside), torch.full((1, 2), 0.5**0.5, dtype=torch.float64))


def test_where_no_direction_does_anything_there_is_none() -> None:
    d = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [0.3, -0.7]])
    g = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-3.0, -6.0], [-0.03, 0.07]])
    assert not bool(bisector(d, g).any())
    assert capacity(d, g).dtype == bisector(d, g).dtype == torch.float32
    values, basis = linearised_optimum(d, g, 2)
    assert (values.shape, basis.shape) == ((0,), (0, 2))
    assert bool(bisector(d, g.flip(1)).any())  # control
    for function in (capacity, bisector, random_direction_moments):
        with pytest.raises(ValueError, match="must be finite and of one shape"):
            function(d, g / 0)
    with pytest.raises(ValueError, match="rank 0 of 4 pairs"):
        linearised_optimum(d, g, 0)


@pytest.mark.parametrize(("n", "d"), [(4, 50), (60, 12)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_linearised_optimum_of_many_pairs(n: int, d: int, rank: int) -> None:
    """Against all eigenvalues of the d x d matrix, and against the mean effect of patches over the pairs."""
    differences, gradients = normal(n, d) + 0.5, normal(n, d, seed=1) + 0.2
    outer = differences[:, :, None] * gradients[:, None, :]
    matrix = (outer + outer.mT).mean(0) / 2
    positive = np.linalg.eigvalsh(matrix.numpy())[::-1][:rank]
    positive = positive[positive > 1e-9]
    values, basis = linearised_optimum(differences, gradients, rank)
    np.testing.assert_allclose(values.numpy(), positive, atol=1e-12)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))

    def mean_effect(rows: Tensor) -> float:
        return float(((differences @ rows.T) * (gradients @ rows.T)).sum(1).mean())

    assert mean_effect(basis) == pytest.approx(positive.sum(), abs=1e-12)
    cross = differences.T @ gradients / n
    others = [torch.linalg.svd(cross)[2][: len(basis)]]  # control: not the singular vectors of E[D G^T]
    others += [random_subspace(len(basis), d, seed=seed, dtype=torch.float64) for seed in range(20)]
    assert max(map(mean_effect, others)) < positive.sum() - 1e-3


def test_moments_of_a_random_patch_by_exact_quadrature() -> None:
    """Polynomials of degree four on the sphere in three dimensions: Gauss-Legendre in height, even steps in angle."""
    heights, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(8))
    angles = torch.arange(16, dtype=torch.float64) * (2 * torch.pi / 16)
    radius = (1 - heights.square()).sqrt()
    v = torch.stack([torch.outer(radius, angles.cos()), torch.outer(radius, angles.sin()),
                     heights[:, None].expand(8, 16)], dim=-1)  # fmt: skip
    share = (weights[:, None] / 32).expand(8, 16)
    for d, g in (TOY, (normal(1, 3), normal(1, 3, seed=1))):
        values = effect(v, d[0], g[0])
        mean, second = random_direction_moments(d, g)
        assert float(mean) == pytest.approx(float((share * values).sum()), abs=1e-14)
        assert float(second) == pytest.approx(float((share * values.square()).sum()), abs=1e-13)
        # control: the formula for independent coordinates, without the term that both share
        assert float(second) != pytest.approx(float(d.square().sum() * g.square().sum()) / 15, rel=1e-3)


def test_moments_of_a_random_patch_in_many_dimensions() -> None:
    d, g = normal(1, 32), normal(1, 32, seed=1) + normal(1, 32)
    drawn = effect(random_directions(40_000, 32, seed=5, dtype=torch.float64), d, g)
    mean, second = (float(x) for x in random_direction_moments(d, g))
    assert mean == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 200)
    assert second == pytest.approx(float(drawn.square().mean()), abs=4 * float(drawn.square().std()) / 200)
    assert abs(mean) > 8 * float(drawn.std()) / 200  # control: a mean of zero would be seen


# --------------------------------------------------------------------------------------------- what a reader can see
def test_the_row_space_agrees_with_scipy() -> None:
    reader = normal(9, 4) @ normal(4, 20, seed=1)
    found = row_space(reader)
    assert found.rank == 4
    assert overlap(found.basis, torch.from_numpy(scipy.linalg.orth(reader.numpy().T).T)) == pytest.approx(1.0)
    kernel = torch.from_numpy(scipy.linalg.null_space(reader.numpy()).T)
    assert float((found.basis @ kernel.T).abs().max()) < 1e-12
    np.testing.assert_allclose(found.singular_values.numpy(), np.linalg.svd(reader.numpy())[1], atol=1e-12)
    torch.testing.assert_close((reader @ found.basis.T).norm(dim=0), found.singular_values[:4])
    twice = torch.cat([reader[:1], reader[:1], 0 * reader[:1], reader])  # what QR would give no direction of its own
    assert overlap(row_space(twice).basis, found.basis) == pytest.approx(1.0)
    assert row_space(twice).rank == 4
    assert row_space(torch.zeros(2, 3)).rank == 0
    assert row_space(torch.zeros(2, 3)).effective_rank == 0.0
    for wrong in (torch.zeros(0, 3), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="needs finite weights"):
            row_space(wrong)
    with pytest.raises(ValueError, match=r"tolerance=1\.0"):
        row_space(reader, tolerance=1.0)


def test_the_effective_rank_of_known_spectra() -> None:
    frame = random_subspace(3, 8, seed=0, dtype=torch.float64)
    assert row_space(2 * frame).effective_rank == pytest.approx(3.0)
    assert row_space(frame[:1] * 5).effective_rank == pytest.approx(1.0)
    gains = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)  # shares 2/3, 1/6, 1/6
    shares = np.array([4, 1, 1]) / 6
    assert row_space(gains[:, None] * frame).effective_rank == pytest.approx(np.exp(stats.entropy(shares)))
    assert row_space(gains[:, None] * frame).effective_rank != pytest.approx(
        np.exp(stats.entropy(gains / 4))
    )  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_centred_reader_has_a_dead_direction_that_qr_keeps(dtype: torch.dtype) -> None:
    """An output weight centred because a norm follows: 24 rows of rank 23."""
    weight = normal(24, 96).to(dtype)
    weight = weight - weight.mean(0)
    found = row_space(weight)
    assert found.rank == 23
    exact = torch.from_numpy(scipy.linalg.orth(weight.double().numpy().T, rcond=1e-5).T)
    assert overlap(found.basis, exact) == pytest.approx(1.0)
    q = torch.linalg.qr(weight.double().T)[0].T  # control: one direction too many, and the weight hardly sees it
    assert len(q) == 24
    assert float((weight.double() @ q[-1]).norm()) < 1e-4 * float(found.singular_values[0])
    inside = (q[-1] @ exact.T).square().sum()
    assert float(inside) < 0.5


@pytest.mark.parametrize(("k", "r"), [(1, 5), (3, 5), (6, 4)])
def test_the_parts_of_a_split(k: int, r: int) -> None:
    """Against the projectors of numpy's pseudo-inverse; a patch of both parts is one of the visible part."""
    reader = normal(r, 12, seed=2)
    basis = random_subspace(k, 12, seed=3, dtype=torch.float64)
    seen = torch.from_numpy(np.linalg.pinv(reader.numpy()) @ reader.numpy())
    split = split_by_row_space(basis, row_space(reader).basis)
    assert split.row is not None
    assert split.null is not None
    assert (len(split.row), len(split.null)) == (min(k, r), min(k, 12 - r))
    torch.testing.assert_close(split.row @ seen, split.row)
    assert float((reader @ split.null.T).abs().max()) < 1e-12
    torch.testing.assert_close(split.span @ split.span.T, torch.eye(len(split.span), dtype=torch.float64))
    assert split.visible == pytest.approx(float((basis @ seen).square().sum()) / k)
    torch.testing.assert_close(basis @ split.span.T @ split.span, basis)  # the span contains the subspace
    d = normal(12, seed=4)
    patched = {name: reader @ (rows.T @ (rows @ d)) for name, rows in
               [("row", split.row), ("null", split.null), ("span", split.span), ("all", basis)]}  # fmt: skip
    assert float(patched["null"].abs().max()) < 1e-12
    torch.testing.assert_close(patched["span"], patched["row"])
    if k == 1:
        assert bool((split.row @ basis.T > 0).all() & (split.null @ basis.T > 0).all())
        cosine = float((basis @ split.row.T).squeeze())
        assert split.visible == pytest.approx(cosine**2)
        assert not torch.allclose(patched["all"], patched["row"])  # a null part that varies is carried over by a patch
    # control: for another reader neither identity holds
    other = reader + 0.1 * normal(r, 12, seed=5)
    assert float((other @ split.null.T).abs().max()) > 1e-3
    assert not torch.allclose(other @ (split.span.T @ (split.span @ d)), other @ (split.row.T @ (split.row @ d)))


def test_a_part_that_is_not_there_is_none() -> None:
    rows = random_subspace(3, 8, seed=0)
    whole = split_by_row_space(rows[:2], rows)
    assert whole.null is None
    assert whole.visible == pytest.approx(1.0)
    assert overlap(whole.span, rows[:2]) == pytest.approx(1.0)
    none = split_by_row_space(rows[2:], rows[:2])
    assert none.row is None
    assert none.visible == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(none.span, rows[2:])
    blind = split_by_row_space(rows, row_space(torch.zeros(2, 8)).basis)
    assert blind.row is None
    nearly = torch.nn.functional.normalize(rows[:1] + 1e-3 * rows[2:], dim=1)  # control: a short part is a part
    assert split_by_row_space(nearly, rows[:2]).null is not None
    for wrong in (3 * rows, rows[:0], rows[:, :5]):
        with pytest.raises(ValueError, match="orthonormal rows of one width"):
            inspect.unwrap(split_by_row_space)(wrong, rows)


def test_a_short_part_keeps_its_digits() -> None:
    rows = random_subspace(4, 30, seed=0, dtype=torch.float64)
    outside = random_subspace(5, 30, seed=1, dtype=torch.float64)[4:]
    outside = torch.nn.functional.normalize(outside - outside @ rows.T @ rows, dim=1)
    split = split_by_row_space(torch.nn.functional.normalize(rows[:1] + 1e-5 * outside, dim=1), rows, tolerance=1e-6)
    assert split.null is not None
    assert float((split.null @ rows.T).abs().max()) < 1e-14
    assert float((split.null @ outside.T).squeeze()) == pytest.approx(1.0, abs=1e-9)


def test_the_visible_fraction_of_a_random_direction_is_beta() -> None:
    rows = random_subspace(8, 30, seed=0, dtype=torch.float64)
    drawn = random_directions(4000, 30, seed=1, dtype=torch.float64)
    visible = (drawn @ rows.T).square().sum(1)
    for one in (0, 17):  # what is counted below is what a split says
        assert split_by_row_space(drawn[one : one + 1], rows).visible == pytest.approx(float(visible[one]))
    law = stats.beta(4, 11)
    assert stats.kstest(visible.numpy(), law.cdf).pvalue > 1e-3
    assert stats.kstest(visible.numpy(), stats.beta(8, 22).cdf).pvalue < 1e-6  # control: ranks in place of their halves
    for q in (0.025, 0.5, 0.975):
        assert visible_fraction_quantile(8, 30, q) == pytest.approx(law.ppf(q), abs=1e-12)
    assert visible_fraction_moments(1, 8, 30) == pytest.approx((law.mean(), law.std()), abs=1e-12)
    p = 8 / 30
    assert visible_fraction_moments(1, 8, 30)[1] == pytest.approx((p * (1 - p) / 16) ** 0.5, abs=1e-12)


@pytest.mark.parametrize(("k", "r"), [(3, 8), (10, 4), (9, 10)])
def test_moments_of_the_visible_fraction_of_a_random_subspace(k: int, r: int) -> None:
    rows, n = random_subspace(r, 12, seed=0, dtype=torch.float64), 2000
    frames = torch.linalg.qr(normal(n, 12, k))[0]
    drawn = (rows @ frames).square().sum((1, 2)) / k
    mean, sd = visible_fraction_moments(k, r, 12)
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * sd / n**0.5)
    assert float(drawn.std()) == pytest.approx(sd, rel=0.07)
    single = visible_fraction_moments(1, r, 12)[1]
    assert float(drawn.std()) != pytest.approx(single / k**0.5, rel=0.07)  # control: rows are not independent


def test_laws_at_their_ends() -> None:
    assert visible_fraction_moments(5, 2, 5) == (0.4, 0.0)
    assert visible_fraction_moments(1, 1, 1) == (1.0, 0.0)
    assert (visible_fraction_quantile(0, 5, 0.9), visible_fraction_quantile(5, 5, 0.1)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="k=3, r=2 in 2 dimensions"):
        visible_fraction_moments(3, 2, 2)
    with pytest.raises(ValueError, match=r"q=1\.5"):
        visible_fraction_quantile(1, 2, 1.5)
