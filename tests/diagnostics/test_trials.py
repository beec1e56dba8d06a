"""The choice of site and strength, on scores written by hand."""

import torch


def _trial(clean, edited, random):
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.diagnostics.trials import Trial

    n = len(clean)
    contrast = Contrast("x", tuple(Prompt(text=str(i)) for i in range(n)), (0,) * n)
    return Trial(contrast, clean, edited, random, torch.empty(0, n))


def test_rates_and_verdicts() -> None:
    n = 128
    clean, random = -torch.ones(n), -torch.ones(100, n)
    flipped = _trial(clean, torch.ones(n), random)
    assert flipped.rate("x", "claim").verdict == "supported"
    assert flipped.rate("x", "claim").estimate == 1.0
    unmoved = _trial(clean, clean.clone(), random)
    assert unmoved.rate("x", "claim").verdict == "refuted"
    assert unmoved.rate("x", "claim", wanted="same").verdict == "supported"
    assert flipped.rate("x", "claim", wanted="same").verdict == "refuted"
    assert flipped.rate("x", "claim", wanted="below").verdict == "refuted"
    assert unmoved.random_rate("x", "claim").estimate == 0.0


def test_a_random_direction_that_does_the_same_takes_the_verdict_away() -> None:
    n = 128
    random = torch.where(torch.arange(100)[:, None] % 2 == 0, torch.ones(100, n), -torch.ones(100, n))
    assert _trial(-torch.ones(n), torch.ones(n), random).rate("x", "claim").verdict == "inconclusive"


def test_wrong_way_counts_prompts_not_means() -> None:
    clean = torch.zeros(100)
    edited = torch.where(torch.arange(100) < 30, -1.0, 10.0)
    finding = _trial(clean, edited, torch.zeros(100, 100)).wrong_way("x", "claim")
    assert finding.estimate == 0.3
    assert finding.verdict == "refuted"


def test_a_behaviour_that_is_never_shown_cannot_be_shown_to_stay() -> None:
    never = _trial(-torch.ones(128), -torch.ones(128), -torch.ones(100, 128))
    assert never.rate("x", "still judged harmful", wanted="same", least=0.5).verdict == "not tested"
    always = _trial(torch.ones(128), torch.ones(128), torch.ones(100, 128))
    assert always.rate("x", "becomes harmful", most=0.5).verdict == "not tested"
    assert always.rate("x", "still judged harmful", wanted="same", least=0.5).verdict == "supported"


def test_directions_from_shuffled_labels_take_the_verdict_away_too() -> None:
    from dataclasses import replace

    n = 128
    some = torch.where(torch.arange(n) < 40, 1.0, -1.0)
    trial = _trial(-torch.ones(n), some, -torch.ones(100, n))
    assert trial.rate("x", "claim").verdict == "supported"
    shuffled = torch.where(torch.arange(n) < 60, 1.0, -1.0).expand(50, n)
    assert replace(trial, permuted=shuffled).rate("x", "claim").verdict != "supported"
