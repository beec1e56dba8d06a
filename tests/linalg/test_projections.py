"""Components inside and outside a subspace, against the textbook projector B^T B and least squares."""

import inspect

import numpy as np
import pytest
import torch

from subspace_probe.linalg.bases import random_subspace
from subspace_probe.linalg.projections import coords, lift, project, reject


@pytest.fixture
def basis() -> torch.Tensor:
    return random_subspace(3, 10, seed=0, dtype=torch.float64)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def origin() -> torch.Tensor:
    return torch.randn(10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_coordinates_are_the_least_squares_ones(x: torch.Tensor, basis: torch.Tensor) -> None:
    expected = np.linalg.lstsq(basis.numpy().T, x.reshape(-1, 10).numpy().T, rcond=None)[0].T.reshape(4, 5, 3)
    np.testing.assert_allclose(coords(x, basis), expected, atol=1e-12)
    torch.testing.assert_close(coords(lift(coords(x, basis), basis), basis), coords(x, basis))
    assert float(coords(-basis[0], basis)[0]) == pytest.approx(-1.0)  # signed


def test_project_and_reject_are_the_textbook_projectors(
    x: torch.Tensor, basis: torch.Tensor, origin: torch.Tensor
) -> None:
    projector = basis.T @ basis
    torch.testing.assert_close(project(x, basis), x @ projector)
    torch.testing.assert_close(reject(x, basis), x @ (torch.eye(10, dtype=torch.float64) - projector))
    torch.testing.assert_close(project(x, basis, origin), (x - origin) @ projector)


def test_reject_about_an_origin_moves_the_coordinates_to_it(
    x: torch.Tensor, basis: torch.Tensor, origin: torch.Tensor
) -> None:
    moved = coords(reject(x, basis, origin), basis)
    torch.testing.assert_close(moved, coords(origin, basis).expand_as(moved))
    # Control: without the origin they go to zero, which is another point.
    assert float(coords(reject(x, basis), basis).abs().max()) < 1e-12
    assert float(coords(origin, basis).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_x(x: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> None:
    low = x.to(dtype)
    for result in (coords(low, basis), project(low, basis), reject(low, basis), reject(low, basis, basis[0])):
        assert result.dtype == dtype
    # Rounded once, at the end: as near to the exact result as the dtype can be.
    exact = reject(low.double(), basis)
    assert torch.equal(reject(low, basis), exact.to(dtype))


def test_low_precision_is_not_accumulated(x: torch.Tensor, basis: torch.Tensor) -> None:
    low, b = (1000 * x).to(torch.bfloat16), basis.to(torch.bfloat16)
    exact = low.double() - low.double() @ b.double().T @ b.double()
    ours = (reject(low, b).double() - exact).abs().max()
    naive = ((low - (low @ b.T) @ b).double() - exact).abs().max()
    assert ours < naive / 1.5


def test_nothing_is_changed_in_place_and_gradients_flow(basis: torch.Tensor, origin: torch.Tensor) -> None:
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    before = x.detach().clone()
    assert torch.autograd.gradcheck(lambda a: reject(a, basis, origin), (x,))
    assert torch.equal(x.detach(), before)


def test_wrong_shapes_are_refused_with_advice(basis: torch.Tensor) -> None:
    # Under the tests' shape checker the annotation speaks first; users meet the message, so call what they call.
    for function in (coords, project, reject):
        with pytest.raises(ValueError, match=r"vectors of width 9; the basis has width 10\. Use a basis found at"):
            inspect.unwrap(function)(torch.zeros(2, 9), basis)
    with pytest.raises(ValueError, match=r"origin of shape \(1,\); the basis has width 10"):
        inspect.unwrap(reject)(torch.zeros(2, 10), basis, torch.zeros(1))
    with pytest.raises(ValueError, match="given 2 coordinates; the basis has rank 3"):
        inspect.unwrap(lift)(torch.zeros(5, 2), basis)
