"""Similarities with their null: unrelated directions of anisotropic data are unrelated, related ones are related."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import linalg

from tests.planted import activations

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.subspaces import Subspace

D = 128


def states(n: int = 600, seed: int = 0) -> "Activations":
    """Rows with a 1 / i spectrum in a random position."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99))).Q
    x = (torch.randn(n, D, generator=generator) / torch.arange(1, D + 1).sqrt()) @ frame
    return activations(x, torch.arange(n) % 2)


def unrelated(acts: "Activations", k: int, seed: int) -> "Subspace":
    """What k mean differences of random splits of these rows span."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace

    x = acts.at(Site(0))
    signs = torch.randn(k, len(x), generator=torch.Generator().manual_seed(seed)).sign()
    return Subspace.span(signs @ (x - x.mean(0)) / len(x), site=Site(0))


@pytest.mark.parametrize("k", [1, 6])
def test_unrelated_subspaces_of_anisotropic_data_stay_inside_the_null(k: int) -> None:
    from subspace_probe.diagnostics.similarity import compare_subspaces
    from subspace_probe.linalg.nulls import overlap_null

    acts = states()
    found = [
        compare_subspaces(unrelated(acts, k, 2 * s), unrelated(acts, k, 2 * s + 1), acts, draws=200) for s in range(40)
    ]
    assert sum(f.verdict == "supported" for f in found) <= 6  # 2 (or 1) expected; 7 or more has probability 4e-3
    assert sum(f.p <= 0.05 for f in found) <= 6
    # control: by the isotropic null, which should call 2 related, far more are
    edge = found[0].isotropic if k == 1 else float(overlap_null(torch.eye(D), k, k, n=200, seed=0).quantile(0.95))
    assert sum(abs(f.value) > edge for f in found) > 10


@pytest.mark.parametrize("k", [1, 6])
def test_related_subspaces_come_out_above_the_null(k: int) -> None:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.diagnostics.similarity import compare_subspaces

    acts = states()
    a, noise = unrelated(acts, k, 0), unrelated(acts, k, 1)
    b = Subspace.span(a.basis + 0.3 * noise.basis, site=a.site)
    found = compare_subspaces(a, b, acts)
    assert found.verdict == "supported"
    assert found.p == pytest.approx(1 / 501)
    assert found.n == 600
    assert found.kind == ("cosine" if k == 1 else "overlap")
    expected = np.sort(linalg.subspace_angles(a.basis.double().numpy().T, b.basis.double().numpy().T))
    np.testing.assert_allclose(found.angles, expected, atol=1e-6)
    assert abs(found.value) == pytest.approx(
        np.cos(expected[0]) if k == 1 else np.mean(np.cos(expected) ** 2), abs=1e-6
    )


def test_opposite_directions_are_related_and_keep_their_sign() -> None:
    from subspace_probe.diagnostics.similarity import compare_subspaces

    acts = states()
    a = unrelated(acts, 1, 0)
    found = compare_subspaces(a, -a, acts)
    assert found.value == pytest.approx(-1.0)
    assert found.verdict == "supported"


def test_without_activations_it_is_unaudited() -> None:
    from subspace_probe.diagnostics.similarity import compare_subspaces
    from subspace_probe.linalg.nulls import isotropic_cosine_quantile

    acts = states()
    a, b = unrelated(acts, 1, 0), unrelated(acts, 1, 1)
    bare = compare_subspaces(a, b)
    assert bare.null is None
    assert bare.verdict == "unaudited"
    assert bare.p != bare.p
    assert bare.isotropic == pytest.approx(isotropic_cosine_quantile(D, 0.975))
    assert "no null" in str(bare)
    assert compare_subspaces(unrelated(acts, 2, 0), unrelated(acts, 5, 1)).isotropic == pytest.approx(5 / D)
    assert compare_subspaces(a, b, acts).value == bare.value


def test_it_becomes_a_finding_with_its_null() -> None:
    from subspace_probe.diagnostics.similarity import compare_subspaces

    acts = states()
    found = compare_subspaces(unrelated(acts, 2, 0), unrelated(acts, 3, 1), acts)
    line = found.finding("overlap.two_sites", "the two share directions")
    assert (line.name, line.estimate, line.null, line.n) == ("overlap.two_sites", found.value, found.null, 600)
    assert line.verdict == found.verdict
    assert line.interval is None
    assert "with this data's covariance, p=" in line.note
    assert compare_subspaces(unrelated(acts, 2, 0), unrelated(acts, 3, 1)).finding("x", "y").verdict == "unaudited"


def test_the_null_is_of_the_sites_and_tokens_each_was_found_at() -> None:
    """The second's states vary along other axes than the first's, so no cosine at all is expected by chance."""
    from dataclasses import replace

    from subspace_probe.core.activations import MemoryRows
    from subspace_probe.core.sites import Site
    from subspace_probe.diagnostics.similarity import compare_subspaces

    generator = torch.Generator().manual_seed(0)
    first, second = torch.zeros(100, D), torch.zeros(100, D)
    first[:, :8] = torch.randn(100, 8, generator=generator)
    second[:, 50:60] = torch.randn(100, 10, generator=generator)
    acts = activations(first, torch.arange(100) % 2)
    both = replace(acts, rows=MemoryRows({Site(0): first, Site(1): second}))
    a = unrelated(acts, 1, 0)
    there = replace(a, site=Site(1))
    apart = compare_subspaces(a, there, both).null
    other_tokens = compare_subspaces(a, a, acts, acts_b=replace(acts, rows=MemoryRows({Site(0): second}))).null
    together = compare_subspaces(a, replace(a, site=None), acts).null  # control: one site, wide
    assert apart is not None
    assert other_tokens is not None
    assert together is not None
    assert max(abs(apart.low), apart.high, abs(other_tokens.low), other_tokens.high) < 1e-9
    assert together.high > 0.5


def test_the_same_rows_in_blocks_or_in_another_order_give_the_same_null() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.diagnostics.similarity import compare_subspaces

    acts = states(n=5000)  # more than one block
    a, b = unrelated(acts, 2, 0), unrelated(acts, 2, 1)
    first = compare_subspaces(a, b, acts, draws=50)
    second = compare_subspaces(a, b, activations(acts.at(Site(0)).flip(0), torch.arange(5000) % 2), draws=50)
    assert first.null is not None
    assert second.null is not None
    assert first.null.high == pytest.approx(second.null.high, abs=1e-4)
    assert first.p == second.p


def test_what_does_not_fit_is_named() -> None:
    from dataclasses import replace

    from subspace_probe.core.activations import MemoryRows
    from subspace_probe.core.errors import DataError, ShapeError, SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.diagnostics.similarity import compare_subspaces

    acts = states(n=40)
    a = unrelated(acts, 1, 0)
    with pytest.raises(ShapeError, match="width"):
        compare_subspaces(a, Subspace.span(torch.ones(3)))
    with pytest.raises(SiteError, match=r"L5\.resid_post was asked for"):
        compare_subspaces(a, replace(a, site=Site(5)), acts)
    nowhere = replace(a, site=None)
    assert compare_subspaces(nowhere, nowhere, acts).null is not None  # the only site there is
    x = acts.at(Site(0))
    with pytest.raises(SiteError, match="Neither subspace says its site, and these activations hold 2"):
        compare_subspaces(nowhere, nowhere, replace(acts, rows=MemoryRows({Site(0): x, Site(1): x})))
    wide = Subspace.span(torch.eye(D)[:50], site=Site(0))
    with pytest.raises(DataError, match="rank 50 was asked for from 40 rows"):
        compare_subspaces(wide, wide, acts)
