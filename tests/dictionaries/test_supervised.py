"""Supervised dictionaries against closed forms, numpy's least squares and a linear probe."""

import numpy as np
import pytest
import torch


def _factorial(copies: int = 3) -> dict[str, torch.Tensor]:
    """Three attributes of 4, 3 and 2 values, every combination equally often: independent."""
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(3) + 5, torch.arange(2)).repeat(copies, 1)
    return {"io": grid[:, 0], "s": grid[:, 1], "position": grid[:, 2]}


def _correlated(n: int = 300, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(4, (n,), generator=draw)
    second = torch.where(torch.rand(n, generator=draw) < 0.7, first % 3, torch.randint(3, (n,), generator=draw))
    return {"io": first, "s": second}


def _states(attributes: dict[str, torch.Tensor], d: int = 9, noise: float = 0.3, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    n = len(next(iter(attributes.values())))
    x = noise * torch.randn(n, d, generator=draw, dtype=torch.float64) + 2
    for column in attributes.values():
        x = x + torch.randn(int(column.max()) + 1, d, generator=draw, dtype=torch.float64)[column]
    return x


def test_independent_attributes_have_equal_mean_and_mse_codes() -> None:
    from subspace_probe.dictionaries import SupervisedDictionary

    attributes = _factorial()
    x = _states(attributes)
    mean, mse = (SupervisedDictionary.fit(x, attributes, kind=kind) for kind in ("mean", "mse"))
    for name in attributes:
        assert torch.allclose(mean.codes[name], mse.codes[name], atol=1e-10)
    # control: of attributes that come together the mean codes hold each other's part
    attributes = _correlated()
    x = _states(attributes)
    mean, mse = (SupervisedDictionary.fit(x, attributes, kind=kind) for kind in ("mean", "mse"))
    assert float((mean.codes["s"] - mse.codes["s"]).norm()) > 0.3 * float(mse.codes["s"].norm())


def test_correlated_attributes_are_numpys_least_squares() -> None:
    from subspace_probe.dictionaries import SupervisedDictionary

    attributes = _correlated()
    x = _states(attributes)
    known = SupervisedDictionary.fit(x, attributes)
    design = np.concatenate([np.eye(4)[attributes["io"]], np.eye(3)[attributes["s"]], np.ones((len(x), 1))], axis=1)
    wanted = design @ np.linalg.lstsq(design, x.numpy(), rcond=None)[0]
    assert np.allclose(known.reconstruct(attributes).numpy(), wanted, atol=1e-9)
    for name, column in attributes.items():  # no code holds part of the mean
        assert float(known.code(name, column).mean(0).abs().max()) < 1e-10
    worse = SupervisedDictionary.fit(x, attributes, kind="mean").reconstruct(attributes)
    assert float((x - worse).square().sum()) > 1.05 * float((x - torch.from_numpy(wanted)).square().sum())


def test_planted_codes_come_back_and_edits_exchange_them() -> None:
    from subspace_probe.dictionaries import SupervisedDictionary

    attributes = _factorial()
    x = _states(attributes, noise=0.0)
    known = SupervisedDictionary.fit(x, attributes)
    assert torch.allclose(known.reconstruct(attributes), x, atol=1e-10)
    after = (attributes["io"] + 1) % 4
    wanted = known.reconstruct({**attributes, "io": after})
    assert torch.allclose(known.edit(x, "io", before=attributes["io"], after=after), wanted, atol=1e-10)
    assert float((wanted - x).norm(dim=1).min()) > 0.5  # control: the edit moves every state
    assert torch.equal(known.encode(attributes).sum(1), torch.full((len(x),), 3.0, dtype=torch.float64))
    shares = torch.stack(list(known.weights(attributes).values()))
    assert torch.allclose(shares.sum(0), torch.ones(len(x), dtype=torch.float64))


def test_mean_codes_are_zero_where_and_only_where_no_linear_probe_reads() -> None:
    """An exclusive-or can be read, though not linearly: its codes vanish. One of its parts is linear: they do not."""
    from sklearn.linear_model import LogisticRegression

    from subspace_probe.dictionaries import SupervisedDictionary

    grid = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])).double().repeat(50, 1)
    label, part = (grid.prod(1) > 0).long(), (grid[:, 0] > 0).long()
    hidden = SupervisedDictionary.fit(grid, {"xor": label}, kind="mean").codes["xor"]
    plain = SupervisedDictionary.fit(grid, {"part": part}, kind="mean").codes["part"]
    assert float(hidden.abs().max()) < 1e-12
    assert LogisticRegression().fit(grid.numpy(), label.numpy()).score(grid.numpy(), label.numpy()) <= 0.75
    assert float(plain.abs().max()) > 0.9
    assert LogisticRegression().fit(grid.numpy(), part.numpy()).score(grid.numpy(), part.numpy()) == 1.0


def test_what_cannot_be_fitted_or_coded_is_said() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError, UnknownName
    from subspace_probe.dictionaries import SupervisedDictionary

    attributes = _factorial(1)
    x = _states(attributes)
    with pytest.raises(DataError, match="one value only"):
        SupervisedDictionary.fit(x, {"same": torch.zeros(len(x), dtype=torch.long)})
    with pytest.raises(ShapeError, match="has 3 values for 24 states"):
        SupervisedDictionary.fit(x, {"io": torch.arange(3)})
    with pytest.raises(ConfigError, match="name an attribute"):
        SupervisedDictionary.fit(x, {})
    known = SupervisedDictionary.fit(x, attributes)
    with pytest.raises(DataError, match="no code for io=\\[9\\]"):
        known.code("io", torch.tensor([9]))
    with pytest.raises(UnknownName):
        known.code("place", torch.tensor([0]))
