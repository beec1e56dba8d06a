"""The matched-position control, on data where the truth is known."""

from dataclasses import replace

import pytest
import torch

from tests.planted import activations


def _readings(angle_label: float, rotate: bool, n: int = 240, d: int = 24):
    """Two contrasts (factor a, factor b) read at two positions; position two may be a rotated copy of position one."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import T_INST, T_POST_INST
    from subspace_probe.diagnostics.cosines import Reading
    from subspace_probe.finders.mean_difference import MeanDifference

    generator = torch.Generator().manual_seed(5)
    a, b = torch.arange(n) % 2, (torch.arange(n) // 2) % 2
    first = torch.randn(n, d, generator=generator)
    first[:, 0] += 4 * a + 4 * angle_label * b
    first[:, 1] += 4 * (1 - angle_label) * b
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q if rotate else torch.eye(d)
    second = first @ rotation + 0.1 * torch.randn(n, d, generator=generator)
    finder = MeanDifference(null_draws=0)
    out = {}
    for name, x, where in (("one", first, T_INST), ("two", second, T_POST_INST)):
        acts = replace(activations(x, a, b=b), where=where)
        acts = replace(acts, contrast=replace(acts.contrast, pairs=tuple(range(n)), groups=tuple(range(n))))
        out[f"a, {name}"] = Reading("a", acts, Site(0), finder)
        out[f"b, {name}"] = Reading("b", acts.relabel("b"), Site(0), finder)
    return out


PAIRS = (
    ("cosine.cross_position", "a, one", "b, two", "two contrasts, two positions"),
    ("cosine.same_contrast", "a, one", "a, two", "one contrast, two positions"),
    ("cosine.same_position", "a, two", "b, two", "two contrasts, one position"),
)


@pytest.mark.slow
def test_a_cosine_across_positions_says_nothing_where_position_rotates_the_state() -> None:
    """One concept under two names: across positions the cosine is near 0, at one position it is 1."""
    from subspace_probe.diagnostics.cosines import compare

    findings, table = compare(_readings(angle_label=1.0, rotate=True), PAIRS, draws=40)
    cross, control, same = findings
    assert abs(cross.estimate) < 0.6
    assert abs(control.estimate) < 0.6  # the same contrast is as far from itself
    assert same.estimate > 0.95
    assert same.verdict != "supported"  # not shown to be different directions
    assert table.column("cosine") == [finding.estimate for finding in findings]


@pytest.mark.slow
def test_two_concepts_at_one_position_come_out_different() -> None:
    from subspace_probe.diagnostics.cosines import compare

    findings, _ = compare(_readings(angle_label=0.0, rotate=False), PAIRS, draws=40)
    assert abs(findings[2].estimate) < 0.2
    assert findings[2].verdict == "supported"
    assert findings[1].estimate > 0.95  # control: positions that do not rotate leave a contrast where it was


def test_the_chance_range_comes_from_the_covariance_and_not_from_the_dimension() -> None:
    from subspace_probe.diagnostics.cosines import chance_range
    from subspace_probe.linalg.nulls import isotropic_cosine_quantile

    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2000, 64, generator=generator)
    x[:, :2] *= 20  # most of the variance in two of 64 dimensions
    labels = torch.arange(2000) % 2
    from subspace_probe.core.sites import Site
    from subspace_probe.diagnostics.cosines import Reading
    from subspace_probe.finders.mean_difference import MeanDifference

    reading = Reading("x", activations(x, labels), Site(0), MeanDifference(null_draws=0))
    chance = chance_range(reading, reading, seed=0)
    assert chance.high > 3 * isotropic_cosine_quantile(64, 0.975)
