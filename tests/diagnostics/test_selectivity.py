"""Selectivity in closed form, and its choice on other prompts."""

import pytest
import torch


def test_shares_are_of_what_tuning_did_and_the_choice_is_made_elsewhere() -> None:
    from subspace_probe.diagnostics.selectivity import Scale, selectivity

    harmful = torch.arange(40) >= 20
    aligned, tuned = (torch.full((40,), value, dtype=torch.float64) for value in (0.0, 1.0))
    aligned[:10] = 1.0  # half of the utility was there before
    scale = Scale(aligned, tuned, harmful)
    validation = torch.arange(40) % 2 == 0
    keeps_both = torch.cat([torch.ones(20), torch.zeros(20)]).double()
    keeps_half = keeps_both.clone()
    keeps_half[10:15] = 0.0
    found = selectivity(torch.stack([tuned, keeps_half, keeps_both]), scale, validation, seed=0)
    assert (found.chosen, found.value) == (2, 1.0)
    kept, removed = scale.shares(torch.stack([tuned, keeps_half]))
    assert kept.tolist() == pytest.approx([1.0, 0.5])
    assert removed.tolist() == pytest.approx([0.0, 1.0])
    lucky = torch.where(validation, keeps_both, tuned)  # good only where it is chosen
    assert selectivity(lucky[None], scale, validation, seed=0).value == 0.0


def test_an_update_that_did_nothing_has_no_shares() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.diagnostics.selectivity import Scale, selectivity

    same = torch.zeros(20, dtype=torch.float64)
    scale = Scale(same, same, torch.arange(20) >= 10)
    with pytest.raises(DataError, match=r"raised utility by 0\.000"):
        selectivity(same[None], scale, torch.arange(20) % 2 == 0, seed=0)


def test_the_interval_is_that_of_groups() -> None:
    """Ten copies of every prompt are no more evidence than one."""
    from subspace_probe.diagnostics.selectivity import Scale, selectivity

    generator = torch.Generator().manual_seed(0)
    harmful, validation = torch.arange(160) >= 80, torch.arange(160) % 2 == 0
    scores = (torch.rand(160, generator=generator) < torch.where(harmful, 0.2, 0.8)).double()

    def width(copies: int, grouped: bool) -> float:
        rows = torch.arange(160).repeat_interleave(copies)
        ends = Scale(torch.zeros(len(rows)).double(), torch.ones(len(rows)).double(), harmful[rows])
        groups = rows if grouped else None
        found = selectivity(scores[rows][None], ends, validation[rows], groups=groups, seed=0)
        return found.interval.high - found.interval.low

    assert width(10, grouped=True) == pytest.approx(width(1, grouped=False), rel=1e-6)
    assert width(10, grouped=False) < 0.5 * width(1, grouped=False)  # control: copies taken for evidence
    one = selectivity(scores[None], Scale(0 * scores, 0 * scores + 1, harmful), validation, groups=0 * harmful, seed=0)
    assert one.interval.low != one.interval.low
