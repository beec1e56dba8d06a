"""Annotations are checked in every test, and let through only what was checked often before."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import annotations


def test_a_wrong_shape_is_refused_until_a_function_was_checked_often_and_in_the_next_test_again() -> None:
    from subspace_probe.linalg.angles import cosine

    right, wrong = torch.ones(3, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(TypeCheckError):
        cosine(wrong, right)
    for _ in range(annotations.CALLS):
        cosine(right, right)
    with pytest.raises(ValueError, match="given widths"):  # the function's own
        cosine(wrong, right)
    annotations.start_anew()
    with pytest.raises(TypeCheckError):
        cosine(wrong, right)


def test_methods_are_checked_and_let_through_as_well() -> None:
    from subspace_probe.core.subspaces import Subspace

    direction = Subspace.span(torch.ones(3))
    with pytest.raises(TypeCheckError):
        direction.coords([1.0, 2.0, 3.0])  # pyright: ignore[reportArgumentType]
    for _ in range(annotations.CALLS):
        direction.coords(torch.ones(2, 3))
    with pytest.raises((TypeError, AttributeError)):
        direction.coords([1.0, 2.0, 3.0])  # pyright: ignore[reportArgumentType]
