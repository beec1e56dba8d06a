"""PCA against numpy and scikit-learn on whole data, and the ways in which a PCA of activations goes wrong."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as WholePCA
from sklearn.decomposition import IncrementalPCA

from tests.planted import activations, planted

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.subspaces import Subspace


def fit(acts: "Activations", **settings: Any) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.pca import PCA

    return PCA(**{"null_draws": 0, **settings}).fit(acts, Site(0))


def alone(acts: "Activations") -> "Activations":
    """The same rows, every one a pair and a group of its own."""
    own = tuple(range(len(acts.contrast)))
    return replace(acts, contrast=replace(acts.contrast, pairs=own, groups=own))


def aligned(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(float(a.double() @ b.double()))


def paired_rows(
    n_pairs: int = 300, d: int = 40, *, gap: float = 2.0, shared: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive and negative rows in turn; pairs share `shared`, differ by a constant gap along a unit, and by noise."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    labels = torch.arange(2 * n_pairs) % 2
    x = 0.3 * torch.randn(2 * n_pairs, d, generator=generator) + gap * labels[:, None] * unit
    return x + shared * torch.randn(n_pairs, d, generator=generator).repeat_interleave(2, 0), labels, unit


# ------------------------------------------------------------------------------------------------------------ exactness
def test_is_the_whole_data_pca() -> None:
    x, labels, _ = planted(n=500, shift=100.0)
    x = x.double()
    found = fit(activations(x, labels), rank=3)
    whole = WholePCA(3, svd_solver="full").fit(x.numpy())
    singular = np.linalg.svd(x.numpy() - x.numpy().mean(0), compute_uv=False)
    np.testing.assert_allclose(found.notes["eigenvalues"][:10], singular[:10] ** 2 / 499, rtol=1e-8)
    np.testing.assert_allclose(found.notes["explained_variance"], whole.explained_variance_ratio_, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.basis.numpy() * whole.components_, 1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.scale, singular[:3] / 499**0.5, rtol=1e-6)
    np.testing.assert_allclose(found.origin, x.mean(0), rtol=1e-6)


def test_the_components_themselves_are_exact_in_float64() -> None:
    from subspace_probe.finders.pca import principal_components
    from subspace_probe.linalg.moments import Moments

    x = planted(n=500, shift=100.0)[0].double()
    moments = Moments.empty(x.shape[1])
    for block in x.split(37):
        moments = moments.update(block)
    values, vectors = principal_components(moments.covariance())
    _, singular, right = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    np.testing.assert_allclose(values, singular**2 / 499, rtol=1e-8)
    right *= np.sign(np.take_along_axis(right, np.abs(right).argmax(1)[:, None], 1))
    np.testing.assert_allclose(vectors, right, atol=1e-8)


def test_pairs_are_the_svd_of_the_differences_about_zero() -> None:
    x, labels, _ = paired_rows(shared=5.0)
    x = x.double()
    found = fit(activations(x, labels), rank=2, centre="pairs")
    differences = (x[1::2] - x[::2]).numpy()
    _, singular, right = np.linalg.svd(differences, full_matrices=False)
    np.testing.assert_allclose(found.notes["eigenvalues"][:10], singular[:10] ** 2 / 300, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.basis.numpy() * right[:2], 1)), 1, atol=1e-6)
    np.testing.assert_allclose(found.scale[0], np.sqrt(np.mean((differences @ right[0]) ** 2)), rtol=1e-6)
    np.testing.assert_allclose(found.origin, x.mean(0), atol=1e-5)


def test_classes_are_centred_each_on_its_own_mean() -> None:
    x, _, unit = planted(n=900, gap=0.0)
    labels = (torch.arange(900) % 3 == 0).long()  # classes of unequal size
    x = x + 30 * labels[:, None] * unit
    found = fit(alone(activations(x.double(), labels)), rank=2, centre="classes")
    inside = x.double().numpy().copy()
    for label in (0, 1):
        inside[labels == label] -= inside[labels == label].mean(0)
    _, singular, right = np.linalg.svd(inside, full_matrices=False)
    np.testing.assert_allclose(found.notes["eigenvalues"][:2], singular[:2] ** 2 / 898, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.basis.numpy() * right[:2], 1)), 1, atol=1e-6)
    middle = (x[labels == 1].double().mean(0) + x[labels == 0].double().mean(0)) / 2
    np.testing.assert_allclose(found.origin, middle, atol=1e-5)


@pytest.mark.filterwarnings("ignore::subspace_probe.core.errors.IllusionWarning")  # within classes, as it should
@pytest.mark.parametrize("centre", ["all", "classes", "pairs"])
def test_order_blocks_and_dtype_change_nothing(centre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows shuffled, so that the two rows of a pair lie in different blocks."""
    from subspace_probe.core.activations import Activations

    x, labels, _ = paired_rows(shared=1.0)
    acts = activations(x, labels)
    settings = {"centre": centre, "rank": 2, "null_draws": 20}
    first = fit(acts, **settings)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    whole = Activations.batches
    monkeypatch.setattr(Activations, "batches", lambda self, site, size=13: whole(self, site, 13))
    second = fit(acts.take(order), **settings)
    assert torch.allclose(first.basis, second.basis, atol=1e-4)
    assert torch.allclose(first.scale, second.scale, rtol=1e-5)
    assert torch.allclose(first.origin, second.origin, atol=1e-5)
    assert first.found == second.found
    assert first.notes["suggested_rank"] == second.notes["suggested_rank"]
    assert first.notes["p"] == pytest.approx(second.notes["p"], rel=1e-4)
    assert first.notes["null_95"] == pytest.approx(second.notes["null_95"], rel=1e-5)


def test_several_rows_a_side_are_averaged_and_incomplete_pairs_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 0] * 10)
    pairs = torch.arange(60) // 6 * 2
    labels[:6] = 0  # the first pair has lost its positive rows
    acts = activations(x, labels)
    acts = replace(acts, contrast=replace(acts.contrast, pairs=tuple(pairs.tolist()), groups=tuple(pairs.tolist())))
    differences = np.stack(
        [
            (x[(pairs == p) & (labels == 1)].mean(0) - x[(pairs == p) & (labels == 0)].mean(0)).numpy()
            for p in pairs.unique()[1:]
        ]
    )
    singular = np.linalg.svd(differences, compute_uv=False)
    order = torch.randperm(60, generator=generator)
    for a in (acts, acts.take(order)):
        found = fit(a, centre="pairs")
        np.testing.assert_allclose(found.notes["eigenvalues"], singular**2 / 9, rtol=1e-8)


# ------------------------------------------------------------------------------------------------------ what goes wrong
def test_a_class_sorted_stream_does_not_matter_where_incremental_pca_is_lost() -> None:
    """The first class varies along one axis, the second, which is larger, along another."""
    generator = torch.Generator().manual_seed(0)
    n, d = 4000, 32
    labels = (torch.arange(n) >= 500).long()
    x = 0.1 * torch.randn(n, d, generator=generator)
    x[:500, 0] += 3 * torch.randn(500, generator=generator)
    x[500:, 1] += 2 * torch.randn(n - 500, generator=generator)
    whole = torch.from_numpy(WholePCA(1, svd_solver="full").fit(x.double().numpy()).components_[0])
    one_by_one = torch.from_numpy(IncrementalPCA(1, batch_size=100).fit(x.double().numpy()).components_[0])
    assert aligned(one_by_one, whole) < 0.05  # the control: lost
    acts = alone(activations(x, labels))
    assert aligned(fit(acts).unit, whole) > 0.999
    order = torch.argsort(labels, descending=True, stable=True)
    assert aligned(fit(acts.take(order)).unit, whole) > 0.999


def test_centring_the_differences_deletes_the_signal_and_zero_keeps_it() -> None:
    """RepE's recipe with scikit-learn's PCA, which centres, as published libraries have it."""
    x, labels, unit = paired_rows(shared=5.0)
    centred = WholePCA(1).fit((x[1::2] - x[::2]).double().numpy()).components_[0]
    assert aligned(torch.from_numpy(centred), unit) < 0.3  # the control
    found = fit(activations(x, labels), centre="pairs", null_draws=99)
    assert float(found.unit @ unit) > 0.98
    assert found.found
    assert found.notes["gap_share"] > 0.95
    assert found.notes["orientation"] == "towards label 1"


def test_it_warns_where_the_subspace_holds_none_of_the_difference() -> None:
    from subspace_probe.core.errors import IllusionWarning

    x, labels, unit = paired_rows(shared=0.0)
    x[:, 0] += 20 * torch.randn(len(x), generator=torch.Generator().manual_seed(1))
    acts = alone(activations(x, labels))
    with pytest.warns(IllusionWarning, match=r"class means differ by 2.*inside by.*use PCA\(centre='pairs'\) or Mean"):
        found = fit(acts, null_draws=99)
    assert found.notes["gap_share"] < 0.1
    assert aligned(found.unit, unit) < 0.3
    with pytest.warns(IllusionWarning, match="Centring each class deletes it"):
        fit(alone(activations(*paired_rows()[:2])), centre="classes", null_draws=99)
    with pytest.warns(IllusionWarning, match=r"use MeanDifference\(paired=True\)"):
        fit(activations(x, labels), centre="pairs", null_draws=99)  # a nuisance that pairs do not share
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # controls: no difference at all; one that the subspace holds; not asked
        noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(2))
        fit(activations(noise, torch.arange(400) % 2), null_draws=99)
        fit(alone(activations(*paired_rows()[:2])), null_draws=99)
        fit(acts, null_draws=0)


# --------------------------------------------------------------------------------------------- rank, sign and evidence
def low_rank(n: int = 1000, d: int = 100, rank: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q.T
    return torch.randn(n, d, generator=generator) + 3 * torch.randn(n, rank, generator=generator) @ basis


def test_the_rank_is_that_of_parallel_analysis_and_not_a_share_of_the_variance() -> None:
    x = low_rank()
    acts = alone(activations(x, torch.arange(1000) % 2))
    found = fit(acts, rank=None, null_draws=60)
    assert found.rank == found.notes["suggested_rank"] == 5
    assert found.found
    compared = found.notes["correlation_eigenvalues"][:6]
    assert [value > found.notes["noise_eigenvalue_95"] for value in compared] == [True] * 5 + [False]
    assert WholePCA(0.99).fit(x.numpy()).n_components_ > 80  # control
    assert fit(acts, rank=5, null_draws=60).found
    assert not fit(acts, rank=6, null_draws=60).found  # the sixth is noise
    noise = fit(alone(activations(torch.randn(500, 30), torch.arange(500) % 2)), rank=None, null_draws=60, seed=3)
    assert noise.rank == 1


@pytest.mark.parametrize("centre", ["all", "classes", "pairs"])
def test_noise_is_not_found_in_all_but_five_per_cent(centre: str) -> None:
    outcomes = []
    for seed in range(20):
        x = torch.randn(80, 16, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 2.0, 16)
        acts = activations(x, torch.arange(80) % 2)
        acts = acts if centre == "pairs" else alone(acts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # label permutations warn in 5 % of cases as well
            outcomes.append(fit(acts, centre=centre, null_draws=39, seed=seed).found)
    assert sum(outcomes) <= 4  # 1 expected; 5 or more has probability 3e-3


def test_copies_are_no_evidence() -> None:
    """Twenty prompts, each captured at twenty tokens that hardly differ: 400 rows, but 20 groups."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=generator)
    x = base.repeat_interleave(20, 0) + 0.01 * torch.randn(400, 30, generator=generator)
    acts = alone(activations(x, torch.arange(400) // 20 % 2))
    groups = tuple((torch.arange(400) // 20).tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fooled = fit(acts, null_draws=59)
    grouped = fit(replace(acts, contrast=replace(acts.contrast, groups=groups)), null_draws=59)
    assert fooled.found  # the control: taken for independent rows
    assert not grouped.found
    assert grouped.notes["n_independent"] == 20


def test_pairs_need_a_common_difference_and_count_groups() -> None:
    """A strong axis of differences with random signs is no axis that separates; nor are copies of one pair many."""
    from subspace_probe.core.errors import DataError

    generator = torch.Generator().manual_seed(0)
    x, labels, unit = paired_rows(gap=0.0)
    signed = x + 4 * (labels * torch.randn(300, generator=generator).sign().repeat_interleave(2))[:, None] * unit
    found = fit(activations(signed, labels), centre="pairs", null_draws=99)
    assert found.notes["suggested_rank"] == 1
    assert not found.found
    few, _, _ = paired_rows(5, gap=0.5, seed=1)
    copies = few.repeat(40, 1) + 0.01 * torch.randn(400, 40, generator=generator)
    acts = activations(copies, torch.arange(400) % 2)
    groups = tuple((torch.arange(400) // 2 % 5).tolist())
    assert fit(acts, centre="pairs", null_draws=99).found  # control
    grouped = fit(replace(acts, contrast=replace(acts.contrast, groups=groups)), centre="pairs", null_draws=99)
    assert not grouped.found
    assert grouped.notes["n_independent"] == 5
    with pytest.raises(DataError, match="none of 400 pairs has both"):
        fit(alone(acts), centre="pairs")


def test_pairs_that_share_a_group_by_way_of_others_are_one_unit() -> None:
    from subspace_probe.finders.pairing import CompletePairs

    labels, pairs = torch.tensor([0, 1] * 5), torch.arange(10) // 2
    groups = torch.tensor([0, 1, 1, 2, 3, 3, 2, 2, 9, 9])  # pair 0 and 1 share group 1, pair 1 and 3 group 2
    assert CompletePairs.of(labels, pairs).units(groups).tolist() == [0, 0, 1, 0, 2]


def test_signs_point_to_label_one_where_the_classes_differ() -> None:
    x, labels, unit = paired_rows(gap=5.0)
    for y, sign in ((labels, 1), (1 - labels, -1)):
        for centre in ("all", "pairs"):
            found = fit(activations(x, y), centre=centre)
            assert sign * float(found.unit @ unit) > 0.95
            assert found.notes["orientation"] == "towards label 1"
    x = low_rank()
    found = fit(alone(activations(x, torch.arange(1000) % 2)), rank=2)
    for row in found.basis:
        assert float(row[row.abs().argmax()]) > 0
    assert found.notes["orientation"] == "largest coordinate positive"
    one_class = fit(alone(activations(x, torch.ones(1000, dtype=torch.long))), rank=2)
    assert torch.allclose(one_class.basis, found.basis)
    assert one_class.notes["gap_share"] is None


def test_identical_states_have_no_component() -> None:
    for centre in ("all", "classes", "pairs"):
        found = fit(activations(torch.ones(20, 8), torch.arange(20) % 2), centre=centre, null_draws=20)
        assert not found.found
        assert float(found.scale[0]) == 0.0


def test_one_group_alone_finds_nothing() -> None:
    acts = activations(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2)
    acts = replace(acts, contrast=replace(acts.contrast, groups=(0,) * 20))
    for centre in ("all", "classes", "pairs"):
        found = fit(acts, centre=centre, rank=None, null_draws=20)
        assert (found.rank, found.found) == (1, False)


def test_it_is_saved_with_its_notes(tmp_path: Any) -> None:
    from subspace_probe.core.subspaces import Subspace

    found = fit(activations(low_rank(), torch.arange(1000) % 2), rank=2, null_draws=20)
    assert Subspace.load(found.save(tmp_path / "pca.safetensors")).notes == found.notes


def test_what_cannot_be_fitted_is_named() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, RankError

    acts = activations(torch.randn(12, 8), torch.arange(12) % 2)
    with pytest.raises(RankError, match="rank 9, but the site has width 8 and its rows allow at most rank 11"):
        fit(acts, rank=9)
    wide = activations(torch.randn(6, 20), torch.arange(6) % 2)
    for centre, most in (("all", 5), ("classes", 4), ("pairs", 2)):
        assert fit(wide, rank=most, centre=centre).rank == most
        with pytest.raises(RankError, match=f"at most rank {most}"):
            fit(wide, rank=most + 1, centre=centre)
    with pytest.raises(DataError, match="given 1 rows"):
        fit(acts.take(torch.tensor([0])))
    with pytest.raises(ConfigError, match="rank 0; ranks start at 1"):
        fit(acts, rank=0)
    with pytest.raises(DataError, match="no rows of label 1"):
        fit(activations(torch.randn(12, 8), torch.zeros(12, dtype=torch.long)), centre="classes")
    with pytest.raises(DataError, match="none of 6 pairs"):
        fit(activations(torch.randn(12, 8), torch.arange(12) // 2 % 2), centre="pairs")
