"""Joint factor subspaces: axes that correlated labels must not blur, against dense least squares and closed forms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.planted import activations, planted


def _agreeing(agreement: float, n: int = 4000, d: int = 64, *, norm: float = 4.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Balanced labels that agree in exactly that share of either class; axes 0 and 1, of equal norm."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.arange(n) % 2
    rank = torch.arange(n) // 2
    b = torch.where(rank < agreement * n / 2, a, 1 - a)
    x = torch.randn(n, d, generator=generator)
    x[:, 0] += norm * a
    x[:, 1] += norm * b
    return x, a, b


def _singles(x: Tensor, labels: Tensor, **factors: Tensor):
    """Rows that are neither pairs nor groups."""
    acts = activations(x, labels, **factors)
    rows = tuple(range(len(x)))
    return replace(acts, contrast=replace(acts.contrast, pairs=rows, groups=rows))


def _fit_all(acts, **settings):
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces

    return FactorSubspaces(**settings).fit_all(acts, Site(0))


@pytest.mark.parametrize(("agreement", "slack"), [(0.95, 0.003), (0.75, 0.02)])
def test_correlated_labels_are_kept_apart(agreement: float, slack: float) -> None:
    """At correlation r of two labels the mean differences have cosine 2 r / (1 + r^2), and the joint effects none."""
    r = 2 * agreement - 1
    x, a, b = _agreeing(agreement)
    found = _fit_all(activations(x, a, b=b), null_draws=0)
    row = found.cosines.records()[0]
    assert row["correlation"] == pytest.approx(r, abs=1e-9)
    assert row["marginal"] == pytest.approx(2 * r / (1 + r**2), abs=slack)
    assert abs(row["joint"]) < 0.05
    for axis, name in enumerate(("label", "b")):
        assert float(found.subspaces[name].unit[axis]) > 0.98
        assert float(found.subspaces[name].scale[0]) == pytest.approx(4, abs=0.3)
    assert float(found.marginal["label"].unit[0]) < (0.75 if agreement == 0.95 else 0.92)  # control: blurred
    assert found.condition_number == pytest.approx(((1 + r) / (1 - r)) ** 0.5, rel=1e-6)


def test_equals_least_squares_on_all_rows() -> None:
    """Three factors, one of them with three values, unequal cells, a large common mean."""
    generator = torch.Generator().manual_seed(1)
    n = 500
    a, f = torch.randint(0, 2, (n,), generator=generator), torch.randint(0, 3, (n,), generator=generator) * 2 - 1
    g = torch.where(torch.rand(n, generator=generator) < 0.8, a, 1 - a) * 5
    x = torch.randn(n, 10, generator=generator) + 1e3
    x[:, 0] += 2 * a
    x[:, 1] += f
    x[:, 2] += g
    found = _fit_all(activations(x, a, f=f, g=g), null_draws=0)
    columns = [np.ones(n), a.numpy(), (f == 1).numpy(), (f == 3).numpy(), (g == 5).numpy()]
    coef = np.linalg.lstsq(np.stack(columns, 1).astype(float), x.double().numpy(), rcond=None)[0]
    assert np.allclose(found.subspaces["label"].vector.numpy(), coef[1], atol=1e-5)
    assert np.allclose(found.subspaces["g"].vector.numpy(), coef[4], atol=1e-5)
    three = found.subspaces["f"]
    assert three.rank == 2
    effects = np.stack([np.zeros(10), coef[2], coef[3]])
    inside = effects @ three.basis.double().numpy().T @ three.basis.double().numpy()
    assert np.allclose(inside, effects, atol=1e-5)  # the span of the effects
    assert float(three.basis[0, 1]) > 0.9  # the widest axis, and towards larger values
    assert float(three.scale[0]) == pytest.approx(np.ptp(effects @ three.basis[0].double().numpy()), abs=1e-4)


def test_one_factor_is_the_mean_difference() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces
    from subspace_probe.finders.mean_difference import MeanDifference

    acts = activations(*planted(shift=5.0)[:2])
    joint, plain = (
        finder.fit(acts, Site(0)) for finder in (FactorSubspaces(null_draws=0), MeanDifference(null_draws=0))
    )
    assert torch.allclose(joint.vector, plain.vector, atol=1e-5)
    assert torch.allclose(joint.origin, plain.origin, atol=1e-5)


@pytest.mark.slow
def test_found_is_a_test_of_each_factor_with_the_others_held_fixed() -> None:
    """b moves nothing but agrees with the label in 75 %: its mean difference is large, its own effect is not."""
    outcomes = {"label": 0, "b": 0}
    for seed in range(20):
        x, a, b = _agreeing(0.75, n=120, d=12, norm=0.0, seed=seed)
        x[:, 0] += 2 * a
        found = _fit_all(_singles(x, a, b=b), null_draws=19)
        for name in outcomes:
            outcomes[name] += found.subspaces[name].found
        assert float(found.marginal["b"].scale[0]) > 0.6  # control: the factor alone looks large
    assert outcomes["label"] == 20
    assert outcomes["b"] <= 4  # 1 expected; 5 or more has probability 0.003


def test_factors_that_cannot_be_told_apart_are_named() -> None:
    from subspace_probe.core.errors import DataError

    x, a, _ = _agreeing(0.75, n=80)
    free = torch.arange(80) // 2 % 2
    copy = 1 - a
    with pytest.raises(DataError, match=r"label and copy cannot .* \(label=0, copy=0\), \(label=1, copy=1\)") as error:
        _fit_all(activations(x, a, copy=copy, free=free))
    assert "free" not in str(error.value)
    total = a + free  # determined by two others together
    with pytest.raises(DataError, match="label and free and total"):
        _fit_all(activations(x, a, free=free, total=total, other=torch.arange(80) // 4 % 2))


def test_a_nearly_collinear_design_warns_and_says_its_condition_number() -> None:
    from subspace_probe.core.errors import SmallSampleWarning
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces

    x, a, b = _agreeing(0.995, n=800)
    acts = activations(x, a, b=b)
    with pytest.warns(SmallSampleWarning, match=r"condition number 14\.1"):
        found = FactorSubspaces(null_draws=0).fit(acts, Site(0))
    assert found.notes["condition_number"] == pytest.approx(199**0.5, rel=1e-6)
    x, a, b = _agreeing(0.95, n=800)
    FactorSubspaces(null_draws=0).fit(activations(x, a, b=b), Site(0))  # control: no warning, which would be an error


def test_which_factors_are_taken() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, UnknownName

    x, a, b = _agreeing(0.75, n=400)
    constant, row = torch.zeros(400, dtype=torch.long), torch.arange(400)
    assert set(_fit_all(activations(x, a, b=b, same=a, constant=constant), null_draws=0).subspaces) == {"label", "b"}
    with pytest.raises(ConfigError, match=r"row \(400 values\).*FactorSubspaces\(factors=\('b',\)\)"):
        _fit_all(activations(x, a, b=b, row=row))
    assert set(_fit_all(activations(x, a, b=b, row=row), factors=("b",), null_draws=0).subspaces) == {"label", "b"}
    with pytest.raises(UnknownName, match="'c'"):
        _fit_all(activations(x, a, b=b), factors=("c",))
    with pytest.raises(DataError, match="'constant', which has the one value 0"):
        _fit_all(activations(x, a, constant=constant), factors=("constant",))


def test_names_survive_relabelling_and_shuffling() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces
    from subspace_probe.finders.permuting import shuffled

    x, a, b = _agreeing(0.75, n=400)
    acts = _singles(x, a, b=b)
    straight, turned = _fit_all(acts, null_draws=0), _fit_all(acts.relabel("b"), null_draws=0)
    for name in ("label", "b"):
        assert torch.allclose(straight.subspaces[name].vector, turned.subspaces[name].vector, atol=1e-5)
    finder = FactorSubspaces(null_draws=0)
    assert torch.allclose(finder.fit(acts.relabel("b"), Site(0)).vector, straight.subspaces["b"].vector, atol=1e-5)
    for given in (acts, acts.relabel("b")):
        other = shuffled(finder, given, seed=3)
        assert not torch.equal(other.labels, given.labels)
        assert set(_fit_all(other, null_draws=0).subspaces) == {"label", "b"}


def test_swap_moves_one_factor_and_nothing_else() -> None:
    """Without noise, with axes at an angle of 60 degrees: the state with the other value is hit exactly."""
    generator = torch.Generator().manual_seed(2)
    base, axes = torch.randn(8, generator=generator), torch.eye(8)[:2] * 3
    axes[1] = 3 * torch.tensor([0.5, 0.75**0.5, 0, 0, 0, 0, 0, 0])
    a, b = torch.arange(80) % 2, torch.arange(80) // 2 % 2
    x = base + a[:, None] * axes[0] + b[:, None] * axes[1]
    found = _fit_all(activations(x, a, b=b), null_draws=0)
    x_from, x_to = x[3], x[0]  # (1, 1) and (0, 0)
    assert torch.allclose(found.swap(x_from, x_to, "label"), base + axes[0], atol=1e-5)
    assert torch.allclose(found.swap(x_from, x_to, "b"), base + axes[1], atol=1e-5)
    assert torch.equal(found.swap(x_to, x_to, "b"), x_to)
    orthogonal = x_to + found.subspaces["label"].project(x_from) - found.subspaces["label"].project(x_to)
    assert not torch.allclose(orthogonal, base + axes[0], atol=0.5)  # control: read alone, the other leaks in
    assert found.swap(x[:4].half(), x[:4].half(), "b").dtype == torch.float16


def test_leakage_and_residual() -> None:
    from subspace_probe.core.sites import Site

    x, a, b = _agreeing(0.75, n=600, d=8, norm=6.0)
    held, held_a, held_b = _agreeing(0.75, n=600, d=8, norm=6.0, seed=1)
    found = _fit_all(activations(x, a, b=b), null_draws=0)
    table = found.leakage(_singles(held, held_a, b=held_b), Site(0))
    read = {(r["subspace"], r["factor"]): r for r in table.records()}
    for own in ("label", "b"):
        assert read[own, own]["accuracy"] > 0.97
        assert read[own, own]["auroc"] > 0.97
        assert read[own, own]["by_design"] == 1.0
        assert abs(read["residual", own]["accuracy"] - 0.5) < 0.1
        assert read["residual", own]["by_design"] is None
    for i, j in (("label", "b"), ("b", "label")):
        assert read[i, j]["by_design"] == pytest.approx(0.75, abs=0.02)
        assert read[i, j]["accuracy"] == pytest.approx(0.75, abs=0.05)  # what the design forces, and no more
        assert read[i, j]["chance"] == 0.5
    blurred = replace(found, subspaces=found.marginal).leakage(_singles(held, held_a, b=held_b), Site(0))
    assert read["label", "b"]["auroc"] < 0.8
    assert blurred.where(subspace="label", factor="b").column("auroc")[0] > 0.88  # control: marginal axes leak
    residual = found.residual
    assert residual is not None
    assert residual.rank == 6
    assert float((residual.basis @ found.subspaces["b"].basis.T).abs().max()) < 1e-6


@pytest.mark.slow
def test_blocks_row_order_and_disk_make_no_difference(tmp_path: Path) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces
    from subspace_probe.store import open_activations, save_activations

    x, a, b = _agreeing(0.75, n=4200, d=6)  # two blocks
    acts, finder = _singles(x, a, b=b), FactorSubspaces(null_draws=19)
    stored = open_activations(save_activations(acts, tmp_path / "acts"))
    memory, disk = finder.fit_all(acts, Site(0)), finder.fit_all(stored, Site(0))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    other = _fit_all(activations(x[order], a[order], b=b[order]), null_draws=0)
    for name, subspace in memory.subspaces.items():
        assert torch.equal(subspace.vector, disk.subspaces[name].vector)
        assert subspace.notes == disk.subspaces[name].notes
        assert torch.allclose(subspace.vector, other.subspaces[name].vector, atol=1e-5)


def test_labels_are_exchanged_within_the_strata_of_the_other_factors() -> None:
    from subspace_probe.finders.factors import FactorSubspaces

    x, a, b = _agreeing(0.75, n=200, d=6)
    drawn = FactorSubspaces().permuted(_singles(x, a, b=b), 3)
    for value in (0, 1):
        assert int(drawn[b == value].sum()) == int(a[b == value].sum())
        assert not torch.equal(drawn[b == value], a[b == value])
    free = FactorSubspaces().permuted(_singles(x, a), 3)
    assert int(free[b == 1].sum()) != int(a[b == 1].sum())  # control: without the factor there are no strata


def test_null_effects_are_those_of_refits() -> None:
    """The streamed null against fits of the permuted labels themselves."""
    from subspace_probe.core.sites import Site
    from subspace_probe.finders.factors import FactorSubspaces

    x, a, b = _agreeing(0.75, n=200, d=6, norm=0.2)
    acts, finder = _singles(x, a, b=b), FactorSubspaces(null_draws=19, seed=4)
    refits = []
    for draw in range(19):
        drawn = acts.with_labels(tuple(finder.permuted(acts, 4 + draw).tolist()))
        refits.append(FactorSubspaces(null_draws=0).fit(drawn, Site(0)).notes["effect"])
    found = finder.fit(acts, Site(0))
    assert found.notes["null_effect_95"] == pytest.approx(float(np.quantile(refits, 0.95)), rel=1e-6)
    assert found.notes["p"] == pytest.approx((1 + sum(e >= found.notes["effect"] for e in refits)) / 20)


def test_nothing_to_find_and_bad_input() -> None:
    from subspace_probe.core.errors import DataError, ShapeError

    b = torch.arange(40) // 2 % 2
    nothing = _fit_all(activations(torch.full((40, 8), 3.3), torch.arange(40) % 2, b=b))
    assert not any(subspace.found for subspace in nothing.subspaces.values())
    assert nothing.cosines.column("joint") == [None]
    assert torch.equal(nothing.swap(torch.ones(8), torch.zeros(8), "b"), torch.zeros(8))
    x, a, _ = planted(n=40)
    with pytest.raises(DataError, match="no rows of label 1"):
        _fit_all(activations(x, torch.zeros_like(a), b=b))
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"1 rows \(17\)"):
        _fit_all(activations(x, a, b=b))
