"""Patches as edits of a weight and back, against optimisation under constraints."""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from subspace_probe.linalg.rank_one_edits import RankOneEdit, edit_of_patch, patch_of_edit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(d: int = 14, out: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, states with unequal variances, their second moment and a unit direction."""
    states = normal(200, d, seed=1) * torch.linspace(0.3, 3.0, d) + 0.5
    v = normal(d, seed=2)
    return normal(out, d), states, states.T @ states / len(states), v / v.norm()


def test_an_edit_is_the_patch_at_its_key_and_spills_least() -> None:
    weight, states, second, v = setting()
    key, amount = states[3], 1.7
    edit = edit_of_patch(weight, key, second, v, amount)
    edited = edit.applied(weight)
    torch.testing.assert_close(edited @ key, weight @ (key + amount * v), rtol=0, atol=1e-12)
    least = 1 / float(key @ torch.from_numpy(np.linalg.solve(second.numpy(), key.numpy())))
    assert edit.spill == pytest.approx(least, abs=1e-12)
    assert edit.spill == pytest.approx(float((states @ edit.read).square().mean()), abs=1e-12)
    for seed in range(50):  # every other read vector that gives the same at the key
        step = normal(len(key), seed=100 + seed) * 0.1
        other = edit.read + step - key * (step @ key) / (key @ key)
        assert float(other @ key) == pytest.approx(1.0)
        assert float((states @ other).square().mean()) > edit.spill
    naive = key / (key @ key)  # control: the read vector of least length
    assert float((states @ naive).square().mean()) > 1.05 * edit.spill
    assert not torch.allclose(edited @ states[4], weight @ (states[4] + amount * v))  # it is no patch elsewhere


def test_the_ablation_nearest_to_an_edit() -> None:
    weight, states, second, v = setting()
    edit, beta = edit_of_patch(weight, states[3], second, v, 1.7), 0.6
    found = patch_of_edit(weight, edit, second, beta)
    u = found.vector / beta**0.5

    def objective(vector: Tensor) -> float:
        """Mean over states of the squared distance between both changes of the output, over |a|^2."""
        ablated = -(states @ vector)[:, None] * (weight @ vector)
        edited = (states @ edit.read)[:, None] * edit.write
        return float((ablated - edited).square().sum(1).mean() / edit.write.square().sum())

    torch.testing.assert_close(weight @ u, edit.write, rtol=0, atol=1e-11)
    assert found.mismatch == pytest.approx(objective(found.vector), abs=1e-11)
    # the least value in closed form: (beta a + W b)^T (W S^-1 W^T)^-1 (beta a + W b)
    w, a, b = weight.numpy(), edit.write.numpy(), edit.read.numpy()
    gap = beta * a + w @ b
    metric = w @ np.linalg.solve(second.numpy(), w.T)
    assert found.mismatch == pytest.approx(gap @ np.linalg.solve(metric, gap), abs=1e-11)
    kernel = torch.linalg.svd(weight)[2][len(weight) :]
    for seed in range(50):
        assert objective(found.vector + 0.05 * normal(len(kernel), seed=seed) @ kernel) > found.mismatch
    # control: twice the coefficient of b, which fulfils the same constraint, is not the minimum
    pull = np.linalg.solve(second.numpy(), w.T)
    doubled = torch.from_numpy(-2 * b / beta + pull @ np.linalg.solve(metric, a + 2 * w @ b / beta))
    torch.testing.assert_close(weight @ doubled, edit.write, rtol=0, atol=1e-11)
    excess = torch.from_numpy(pull @ np.linalg.solve(metric, w @ b) - b)
    predicted = found.mismatch + float(excess @ second @ excess)
    assert objective(beta**0.5 * doubled) == pytest.approx(predicted, abs=1e-10)
    assert predicted > found.mismatch + 0.1 * edit.spill


def test_a_weight_without_full_rank() -> None:
    """Centred weights cannot write a constant: edits within their range have an ablation, others none."""
    weight, states, second, v = setting()
    centred = weight - weight.mean(0)
    edit = edit_of_patch(centred, states[0], second, v, 1.0)
    found = patch_of_edit(centred, edit, second, 1.0)
    torch.testing.assert_close(centred @ found.vector, edit.write, rtol=0, atol=1e-10)
    outside = RankOneEdit(edit.write + 1.0, edit.read, edit.spill)
    with pytest.raises(ValueError, match="writes what the weight cannot"):
        patch_of_edit(centred, outside, second, 1.0)


def test_what_cannot_be_asked() -> None:
    weight, states, second, v = setting()
    with pytest.raises(ValueError, match="positive definite second moment of width 14"):
        edit_of_patch(weight, states[0], torch.outer(v, v), v, 1.0)
    with pytest.raises(ValueError, match=r"found shape \(3, 3\)"):
        inspect.unwrap(edit_of_patch)(weight, states[0], second[:3, :3], v, 1.0)
    with pytest.raises(ValueError, match="a key that is zero"):
        edit_of_patch(weight, 0 * states[0], second, v, 1.0)
    edit = edit_of_patch(weight, states[0], second, v, 1.0)
    with pytest.raises(ValueError, match="strength=0"):
        patch_of_edit(weight, edit, second, 0.0)
    assert edit.applied(weight.float()).dtype == torch.float32
