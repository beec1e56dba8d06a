"""Latents that tell the classes apart: planted ones are found, others are not, and every number by another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.dictionaries.small import dictionary
from tests.planted import activations

D_IN, D_SAE, PLANTED = 64, 48, 17
STATISTICS = ("d_prime", "mean_difference", "auroc")


def _sae(**options: Any):
    return dictionary(D_IN, D_SAE, **options)


def _rows(n: int = 400, *, signal: float = 0.6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of rows of the dictionary; one of them is active more often where the label is 1."""
    draw = torch.Generator().manual_seed(1000 + seed)
    labels = torch.arange(n) % 2
    active = torch.rand(n, D_SAE, generator=draw) < 0.06
    active[:, PLANTED] |= (torch.rand(n, generator=draw) < signal) & (labels == 1)
    x = (active * (1 + torch.rand(n, D_SAE, generator=draw))) @ _sae().decoder * 2
    return x + 0.05 * torch.randn(n, D_IN, generator=draw), labels


def _fit(x: torch.Tensor, labels: torch.Tensor, sae: Any = None, **settings: Any):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.sae_latents import SAELatents

    return SAELatents(_sae() if sae is None else sae, **settings).fit(activations(x, labels), Site(0))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_planted_latent_is_found(statistic: str, sign: int) -> None:
    x, labels = _rows()
    found = _fit(x, labels if sign == 1 else 1 - labels, statistic=statistic)
    assert found.found
    assert found.notes["latents"] == [PLANTED]
    assert sign * float(found.unit @ _sae().decoder[PLANTED]) > 0.95
    assert found.notes["p"] == pytest.approx(1 / 200)
    assert found.notes["coordinate_gap"][0] > 0
    f = _sae().encode(x)[:, PLANTED].double()
    assert float(found.scale[0]) == pytest.approx(abs(float(f[labels == 1].mean() - f[labels == 0].mean())), rel=1e-5)
    middle = (x[labels == 1].double().mean(0) + x[labels == 0].double().mean(0)) / 2
    assert torch.allclose(found.origin.double(), middle, atol=1e-5)
    json.dumps(found.notes)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_is_found_without_signal(statistic: str) -> None:
    outcomes = [_fit(*_rows(200, signal=0.0, seed=s), statistic=statistic, null_draws=39).found for s in range(20)]
    assert sum(outcomes) <= 4  # 5 % of 20 expected; 5 or more has probability 0.003


def test_the_null_of_one_latent_would_not_do() -> None:
    """Control: against the null of the one latent that was chosen, most data without signal look like findings."""
    from subspace_probe.linalg.permutations import permutation_p, permute_labels

    hits = 0
    for seed in range(10):
        x, labels = _rows(signal=0.0, seed=seed)
        best = _fit(x, labels, null_draws=0).notes["latents"][0]
        f = _sae().encode(x)[:, best].double()

        def gap(y: torch.Tensor, f: torch.Tensor = f) -> float:
            return abs(float(f[y == 1].mean() - f[y == 0].mean()))

        null = torch.tensor([gap(permute_labels(labels, seed=draw)) for draw in range(99)])
        hits += permutation_p(gap(labels), null, side="greater") <= 0.05
    assert hits >= 6


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_are_those_of_scipy(statistic: str) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.sae_latents import SAELatents

    x, labels = _rows()
    finder: Any = SAELatents(_sae(), statistic=statistic, null_draws=9, least_rate=0.0)  # pyright: ignore[reportArgumentType]
    table = finder.ranked(activations(x, labels), Site(0), top=D_SAE)
    f, y = _sae().encode(x).double().numpy(), labels.numpy() == 1
    for record in table.records():
        column = f[:, record["latent"]]
        a, b = column[y], column[~y]
        match statistic:
            case "auroc":
                wanted = stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) - 0.5
            case "mean_difference":
                wanted = a.mean() - b.mean()
            case _:  # Student's t is d' times a constant of the sample sizes
                wanted = stats.ttest_ind(a, b).statistic * np.sqrt(1 / len(a) + 1 / len(b))
        assert record[statistic] == pytest.approx(wanted, abs=1e-6)
        assert record["rate_1"] == pytest.approx((a > 0).mean())
        assert record["mean_0"] == pytest.approx(b.mean(), rel=1e-6)
    ranks = [abs(value) for value in table.column(statistic)]
    assert ranks == sorted(ranks, reverse=True)
    assert table.column("latent")[0] == PLANTED


@pytest.mark.parametrize("statistic", STATISTICS)
def test_order_blocks_and_disk_do_not_matter(statistic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.sites import Site
    from subspace_probe.finders import sae_latents
    from subspace_probe.store import open_activations, save_activations

    x, labels = _rows()
    acts, settings = activations(x, labels), {"statistic": statistic, "k": 3, "null_draws": 19}
    finder: Any = sae_latents.SAELatents(_sae(), **settings)  # pyright: ignore[reportArgumentType]
    whole = finder.fit(acts, Site(0))
    stored = finder.fit(open_activations(save_activations(acts, tmp_path)), Site(0))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    turned = _fit(x[order], labels[order], **settings)
    monkeypatch.setattr(sae_latents, "_CELLS", 7 * D_SAE)
    batches = Activations.batches
    monkeypatch.setattr(Activations, "batches", lambda self, site: batches(self, site, size=37))
    parts = finder.fit(acts, Site(0))
    for other in (stored, turned, parts):
        assert torch.allclose(other.basis * other.scale[:, None], whole.basis * whole.scale[:, None], atol=1e-5)
        assert torch.allclose(other.origin, whole.origin, atol=1e-5)
        assert other.notes["latents"] == whole.notes["latents"]
        assert other.notes["statistics"] == pytest.approx(whole.notes["statistics"], abs=1e-6)
    for other in (stored, parts):
        assert other.notes["p_values"] == whole.notes["p_values"]


def test_several_latents_in_order_of_rank() -> None:
    x, labels = _rows()
    found = _fit(x, labels, k=3, null_draws=0)
    rows = _sae().decoder[found.notes["latents"]] * torch.tensor(found.notes["statistics"]).sign()[:, None]
    span = torch.linalg.lstsq(rows.T, found.basis.T)
    assert torch.allclose(rows.T @ span.solution, found.basis.T, atol=1e-5)  # the span is that of the rows
    assert torch.allclose(found.basis[0], rows[0], atol=1e-5)
    assert bool(((found.basis * rows).sum(1) > 0.5).all())
    assert found.notes["p"] is None
    assert found.found


def test_groups_are_exchanged_together() -> None:
    """Ten sources, each with its own latent and one label: as rows a sure finding, as groups none."""
    from dataclasses import replace

    from subspace_probe.core.sites import Site
    from subspace_probe.finders.sae_latents import SAELatents

    groups, draw = torch.arange(200) // 20, torch.Generator().manual_seed(4)
    x = 2 * _sae().decoder[groups] + 0.05 * torch.randn(200, D_IN, generator=draw)
    acts = activations(x, groups % 2)
    alone = tuple(range(200))
    finder = SAELatents(_sae())
    for kinds, found in ((alone, True), (tuple(groups.tolist()), False)):
        contrast = replace(acts.contrast, pairs=kinds, groups=kinds)
        assert finder.fit(replace(acts, contrast=contrast), Site(0)).found is found


def test_rare_latents_are_not_ranked() -> None:
    x, labels = _rows(signal=0.0)
    x[1:6:2] += 3 * _sae().decoder[5]  # three of four hundred rows
    assert _fit(x, labels, least_rate=0.2, null_draws=0).notes["ranked_latents"] < D_SAE
    x, labels = _rows()
    quiet = _fit(x, labels, sae=dictionary(D_IN, D_SAE, bias=1e3))
    assert (quiet.found, quiet.notes["latents"], float(quiet.scale[0])) == (False, [], 0.0)


def test_settings_carry_a_path_or_a_hash(tmp_path: Path) -> None:
    x, labels = _rows()
    folder = _sae().save(tmp_path / "sae")
    by_path, by_object = _fit(x, labels, sae=folder, null_draws=0), _fit(x, labels, null_draws=0)
    assert torch.equal(by_path.basis, by_object.basis)
    assert by_path.notes["settings"]["sae"] == str(folder)
    assert _sae().key[:12] in by_object.notes["settings"]["sae"]
    assert len(by_object.notes["settings"]["sae"]) < 200
    assert by_object.notes["sae"]["key"] == _sae().key
    assert by_path.notes["sae"]["path"] == str(folder)
    by_path.save(tmp_path / "d.safetensors")


def test_what_does_not_fit() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, RankError, ShapeError, SiteError, StoreError
    from subspace_probe.finders.sae_latents import SAELatents

    x, labels = _rows()
    with pytest.raises(SiteError, match=r"trained at L1\.resid_post"):
        _fit(x, labels, sae=_sae(site="blocks.1.hook_resid_post"))
    _fit(x, labels, sae=_sae(site="blocks.1.hook_resid_pre"), null_draws=0)  # the same state
    _fit(x, labels, sae=_sae(site="somewhere"), null_draws=0)
    with pytest.raises(ShapeError, match="d_in=65 was used on states of width 64"):
        _fit(x, labels, sae=dictionary(65, 4))
    with pytest.raises(DataError, match="no rows of label 1"):
        _fit(x, torch.zeros_like(labels))
    with pytest.raises(DataError, match=r"k=40 .* Lower k or least_rate"):
        _fit(x, labels, k=40, least_rate=0.2)
    with pytest.raises(StoreError, match="No folder"):
        _fit(x, labels, sae="nowhere")
    twins = _sae()
    twins.weights["W_dec"][:] = twins.weights["W_dec"][PLANTED].clone()
    with pytest.raises(RankError, match="span no 2 axes"):
        _fit(x, labels, sae=twins, k=2)
    for wrong in ({"k": 0}, {"null_draws": -1}, {"least_rate": 1.0}):
        with pytest.raises(ConfigError):
            SAELatents(_sae(), **wrong)  # pyright: ignore[reportArgumentType]
