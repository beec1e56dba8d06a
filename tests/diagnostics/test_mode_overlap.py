"""Mode overlap on subspaces whose overlap is known, and the artefact that an uncentred mean makes."""

import torch


def test_overlap_of_known_subspaces() -> None:
    from subspace_probe.diagnostics.mode_overlap import mode_overlap
    from subspace_probe.linalg.modes import modes

    a, b = modes(torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0]))), modes(torch.diag(torch.tensor([0.0, 3.0, 3.0, 0.0])))
    assert a is not None
    assert b is not None
    found = mode_overlap(a, b, 0.9)
    assert abs(found.value - 0.5) < 1e-9
    assert (found.ranks, found.chance) == ((2, 2), 0.5)


def test_orthogonal_variation_about_one_mean_does_not_overlap_and_is_flagged_uncentred() -> None:
    from subspace_probe.diagnostics.mode_overlap import activation_overlap, planted_overlap

    for seed in range(3):
        found = planted_overlap(seed=seed)
        assert found.centred.value <= 0.05
        assert found.uncentred.value >= 0.95
        assert found.mean_artefact
        without = planted_overlap(mean=0.0, seed=seed)  # the control: without a mean there is nothing to flag
        assert without.uncentred.value <= 0.05
        assert not without.mean_artefact
    rows = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    same = activation_overlap(rows[:100], rows[:100])
    assert same.centred.value > 0.999
