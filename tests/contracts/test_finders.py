"""What every finder in the table must do. Adding the line adds the tests."""

import pytest
import torch

from tests.planted import activations, planted

FINDERS = ("mean_difference",)


def test_the_list_above_is_the_table() -> None:
    from subspace_probe.finders import FINDERS as table

    assert tuple(table) == FINDERS


@pytest.fixture(params=FINDERS)
def finder(request: pytest.FixtureRequest):
    from subspace_probe.finders import FINDERS as table

    return table.load(request.param)()


def fit(finder, x, labels, **factors):
    from subspace_probe.core.sites import Site

    return finder.fit(activations(x, labels, **factors), Site(0))


def test_recovers_a_planted_direction_with_its_sign(finder) -> None:
    x, labels, unit = planted(n=2000)
    found = fit(finder, x, labels)
    assert torch.dot(found.unit.double(), unit.double()) > 0.95
    assert found.found


def test_the_planted_check_can_fail(finder) -> None:
    """Control: with the labels shuffled the planted direction is not recovered."""
    x, labels, unit = planted(n=2000)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    assert abs(torch.dot(fit(finder, x, shuffled).unit.double(), unit.double())) < 0.8


@pytest.mark.slow
def test_says_not_found_on_data_without_signal(finder) -> None:
    outcomes = []
    for seed in range(20):
        x, labels, _ = planted(gap=0.0, seed=seed)
        outcomes.append(fit(finder, x, labels).found)
    assert sum(outcomes) <= 4  # 5 % of 20 expected; 5 or more has probability 0.003


def test_row_order_does_not_matter(finder) -> None:
    x, labels, _ = planted()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    a, b = fit(finder, x, labels), fit(finder, x[order], labels[order])
    assert torch.allclose(a.vector, b.vector, atol=1e-5)


def test_names_rows_that_are_not_finite(finder) -> None:
    from subspace_probe.core.errors import ShapeError

    x, labels, _ = planted()
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"L0\.resid_post are not finite in 1 rows \(17\)"):
        fit(finder, x, labels)


def test_a_missing_class_is_an_error(finder) -> None:
    from subspace_probe.core.errors import DataError

    x, labels, _ = planted()
    with pytest.raises(DataError, match="no rows of label 1"):
        fit(finder, x, torch.zeros_like(labels))
