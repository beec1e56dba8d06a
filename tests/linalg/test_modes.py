"""Singular modes against numpy, and the randomised ones against the whole decomposition."""

import numpy as np
import pytest
import torch


def _matrix(out: int, width: int, decay: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(d, 40, generator=generator, dtype=torch.float64))[0] for d in (out, width)
    )
    return left * (decay ** torch.arange(40, dtype=torch.float64)) @ right.T


def test_modes_are_those_of_numpy_and_rounding_is_left_out() -> None:
    from subspace_probe.linalg.modes import modes

    matrix = _matrix(60, 50, 0.6)[:, :45]
    found = modes(matrix)
    assert found is not None
    wanted = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert found.rank == int((wanted > 1e-6 * wanted[0]).sum()) < 40
    assert np.allclose(found.singular.numpy(), wanted[: found.rank])
    rebuilt = (found.left.T * found.singular) @ found.right
    assert float((rebuilt - matrix).abs().max()) < 1e-5
    assert modes(torch.zeros(3, 4)) is None


def test_energy_is_that_of_the_whole_matrix_and_not_of_the_modes_kept() -> None:
    from subspace_probe.linalg.modes import modes

    matrix = torch.diag(torch.tensor([3.0, 2.0, 2.0, 2.0]))
    found = modes(matrix, most=2)
    assert found is not None
    assert found.energy == pytest.approx(21.0)
    assert found.holding(9 / 21) == 1
    assert found.holding(0.9) == 2  # all that were kept: they hold less


def test_large_matrices_get_the_leading_modes() -> None:
    from subspace_probe.linalg.modes import modes

    matrix = _matrix(1200, 1100, 0.8)
    some = modes(matrix, most=5)
    assert some is not None
    wanted = 0.8 ** torch.arange(5, dtype=torch.float64)
    assert torch.allclose(some.singular, wanted, rtol=1e-9)
    assert float((some.left @ some.left.T - torch.eye(5)).abs().max()) < 1e-9


def test_errors() -> None:
    from subspace_probe.linalg.modes import modes

    with pytest.raises(ValueError, match="at least one"):
        modes(torch.eye(3), most=0)
    with pytest.raises(ValueError, match="nan or inf"):
        modes(torch.full((2, 2), float("nan")))
