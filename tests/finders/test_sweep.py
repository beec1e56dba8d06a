"""Choosing a site: right where there is signal, corrected where there is none, and blind to the test prompts."""

import pytest
import torch

from tests.planted import activations, planted


def _many_sites(gap: float, seed: int, n: int = 120, strong: int = 2):
    from subspace_probe.core.activations import MemoryRows
    from subspace_probe.core.sites import Site

    tensors = {}
    for layer in range(5):
        x, labels, _ = planted(n=n, gap=gap if layer == strong else 0.0, seed=100 * seed + layer)
        tensors[Site(layer)] = x
    acts = activations(x, labels)
    from dataclasses import replace

    return replace(acts, rows=MemoryRows(tensors))


@pytest.mark.slow
def test_finds_the_site_with_the_signal() -> None:
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find

    found = find(_many_sites(4.0, 0), MeanDifference(null_draws=39), null_draws=39, seed=0)
    assert found.subspace.site is not None
    assert found.subspace.site.layer == 2
    assert found.subspace.found
    assert found.subspace.notes["test_auroc"] > 0.85
    assert found.table.column("chosen").count(True) == 1


@pytest.mark.slow
def test_the_best_of_many_sites_without_signal_is_not_found() -> None:
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find

    # without a null of its own a direction always counts as found: what is left is the correction
    finder = MeanDifference(null_draws=0)
    sweeps = [find(_many_sites(0.0, seed), finder, null_draws=19, seed=seed) for seed in range(12)]
    assert sum(sweep.subspace.found for sweep in sweeps) <= 3
    # control: without the correction the best validation AUROC looks like something
    assert sum(s.subspace.notes["validation_auroc"] for s in sweeps) / len(sweeps) > 0.55


@pytest.mark.slow
def test_test_prompts_do_not_touch_the_choice() -> None:
    """Rows of the test part are replaced by noise: the direction and the site stay bit for bit the same."""
    from dataclasses import replace

    from subspace_probe.core.activations import MemoryRows
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find

    acts = _many_sites(2.0, 1)
    _, rest = acts.contrast.split(0.5, seed=0)
    _, test = rest.split(0.5, seed=0)
    names = {prompt.text for prompt in test.prompts}
    spoiled = torch.tensor([prompt.text in names for prompt in acts.contrast.prompts])
    tensors = {
        site: torch.where(spoiled[:, None], torch.full_like(acts.at(site), 7.0), acts.at(site)) for site in acts.sites
    }
    finder = MeanDifference(null_draws=0)
    a = find(acts, finder, null_draws=0, seed=0).subspace
    b = find(replace(acts, rows=MemoryRows(tensors)), finder, null_draws=0, seed=0).subspace
    assert a.site == b.site
    assert torch.equal(a.basis, b.basis)
    assert a.notes["test_auroc"] != b.notes["test_auroc"]


def test_says_how_many_prompts_are_needed() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find

    with pytest.raises(DataError, match="needs at least 8"):
        find(_many_sites(4.0, 0, n=8), MeanDifference())


@pytest.mark.slow
@pytest.mark.parametrize("n_groups", [16, 32])
def test_states_that_belong_to_groups_are_no_evidence_row_by_row(n_groups: int) -> None:
    """Every group has its own random state and its own random label: nothing to find, however many rows a group has."""
    from dataclasses import replace

    from subspace_probe.core.sites import Site
    from subspace_probe.finders.mean_difference import MeanDifference

    finder, found, naive = MeanDifference(null_draws=39), 0, 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        group = torch.arange(n_groups).repeat_interleave(10)
        x = torch.randn(n_groups, 24, generator=generator)[group] + 0.1 * torch.randn(
            len(group), 24, generator=generator
        )
        labels = torch.randperm(n_groups, generator=generator)[group] % 2
        acts = activations(x, labels)
        alone = replace(acts.contrast, pairs=tuple(range(len(x))), groups=tuple(range(len(x))))
        naive += finder.fit(replace(acts, contrast=alone), Site(0)).found
        grouped = replace(alone, groups=tuple(group.tolist()))
        found += finder.fit(replace(acts, contrast=grouped), Site(0)).found
    assert found <= 4
    assert naive == 20  # control: rows counted as independent find it every time


@pytest.mark.slow
def test_positions_and_finders_are_ranked_in_one_table() -> None:
    """The signal is at one position and site only; both finders see it there, and what is chosen is best of all."""
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.finders.lda import LDA
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find

    strong = replace(_many_sites(4.0, 0), where=T_INST)
    silent = replace(_many_sites(0.0, 0), where=LAST)
    found = find([silent, strong], [MeanDifference(null_draws=19), LDA(null_draws=19)], null_draws=9, seed=0)
    rows = found.table.records()
    assert len(rows) == 2 * 5 * 2
    assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)
    assert [(row["site"], row["position"]) for row in rows[:2]] == [("L2.resid_post", "t_inst")] * 2
    assert {row["finder"] for row in rows[:2]} == {"mean_difference", "lda"}
    assert rows[0]["chosen"]
    assert found.subspace.where == T_INST
    assert found.subspace.notes["sites_tried"] == 20
    with pytest.raises(ConfigError, match="hold other prompts or labels"):
        find([strong, silent.take(torch.arange(60))], MeanDifference())
    with pytest.raises(ConfigError, match="A sweep over nothing"):
        find([], MeanDifference())


@pytest.mark.slow
def test_a_sweep_over_a_store_is_that_over_memory(tmp_path) -> None:
    from subspace_probe.finders.mean_difference import MeanDifference
    from subspace_probe.finders.sweep import find
    from subspace_probe.store import open_activations, save_activations

    acts = _many_sites(1.0, 3)
    disk = open_activations(save_activations(acts, tmp_path / "acts"))
    a, b = (find(rows, MeanDifference(null_draws=19), null_draws=9, seed=0) for rows in (acts, disk))
    assert a.table.records() == b.table.records()
    assert torch.equal(a.subspace.basis, b.subspace.basis)
    assert a.subspace.notes["p_of_the_best"] == b.subspace.notes["p_of_the_best"]
    part, _ = disk.split(0.5, seed=0)
    assert type(part.rows).__name__ == "KeptRows"  # rows are still on disk
