"""What every finder in the table must do. Adding the line adds the tests."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.planted import activations, planted


@dataclass(frozen=True)
class Claim:
    """What a finder claims to recover, and on which data.

    Attributes:
        settings: from the planted unit vector to the finder's settings.
        data: of `planted`: readers whiten, so that only on noise of equal variance is the planted axis their answer.
        labelled: whether it looks at labels at all.
    """

    settings: Callable[[Tensor], dict[str, Any]] = lambda unit: {}
    data: tuple[tuple[str, Any], ...] = ()
    labelled: bool = True


def _dictionary(unit: Tensor) -> dict[str, Any]:
    """A dictionary in which one latent is the planted axis."""
    from tests.dictionaries.small import dictionary

    sae = dictionary(len(unit), 64, bias=0.0)
    rows = sae.decoder.clone()
    rows[11] = unit
    weights = {**sae.weights, "W_dec": rows, "W_enc": rows.T.clone()}
    return {"sae": type(sae)(sae.configuration, weights)}


EQUAL = (("spread", (1.0, 1.0)),)
CLAIMS: dict[str, Claim] = {
    "mean_difference": Claim(),
    "pca": Claim(lambda unit: {"centre": "pairs"}, (("gap", 8.0),)),
    "factors": Claim(),
    "lda": Claim(data=EQUAL),
    "linear_probe": Claim(data=EQUAL),
    "leace": Claim(),
    "sae_latents": Claim(_dictionary),
}
FINDERS = tuple(CLAIMS)


def test_the_claims_are_of_the_table() -> None:
    from subspace_probe.finders import FINDERS as table
    from subspace_probe.finders import MODEL_FINDERS

    assert tuple(table) == FINDERS
    for registry in (table, MODEL_FINDERS):
        for name in registry:
            kind = registry.load(name)
            assert kind.name == name
            assert kind.cost
            assert kind.use


@pytest.fixture(params=FINDERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Permuted labels separate classes in 5 % of cases, and then PCA rightly warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def data(name: str, **changed: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, labels, unit = planted(**{**dict(CLAIMS[name].data), **changed})
    return x, labels, unit


def fit(name: str, acts: Any, unit: Tensor, **settings: Any) -> Any:
    from subspace_probe.core.sites import Site
    from subspace_probe.finders import FINDERS as table

    return table.load(name)(**{**CLAIMS[name].settings(unit), **settings}).fit(acts, Site(0))


def test_recovers_a_planted_direction_with_its_sign(name: str) -> None:
    x, labels, unit = data(name, n=2000)
    found = fit(name, activations(x, labels), unit, null_draws=39)
    assert torch.dot(found.unit.double(), unit.double()) > 0.95
    assert found.found


def test_the_planted_check_can_fail(name: str) -> None:
    """Control: with the labels shuffled (pairs with them) the planted direction is not recovered."""
    x, labels, unit = data(name, n=2000)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    found = fit(name, activations(x[order], labels), unit, null_draws=39)
    assert not found.found or abs(torch.dot(found.unit.double(), unit.double())) < 0.8


@pytest.mark.slow
def test_says_not_found_on_data_without_signal(name: str) -> None:
    outcomes = []
    for seed in range(20):
        x, labels, unit = data(name, n=200, gap=0.0, seed=seed)
        outcomes.append(fit(name, activations(x, labels), unit, null_draws=19).found)
    assert sum(outcomes) <= 4  # 5 % of 20 expected; 5 or more has probability 0.003


def test_row_order_does_not_matter(name: str) -> None:
    x, labels, unit = data(name)
    acts = activations(x, labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    a, b = fit(name, acts, unit, null_draws=0), fit(name, acts.take(order), unit, null_draws=0)
    assert torch.allclose(a.vector, b.vector, atol=1e-4)
    assert torch.allclose(a.origin, b.origin, atol=1e-4)


def test_blocks_and_disk_make_no_difference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe import store
    from subspace_probe.core.activations import Activations

    x, labels, unit = data(name)
    acts = activations(x, labels)
    whole = fit(name, acts, unit, null_draws=9)
    monkeypatch.setattr(store, "SHARD_BYTES", 4 * x.shape[1] * 70)
    folder = store.save_activations(acts, tmp_path / "acts")
    assert len(list(folder.glob("*.safetensors"))) > 4
    batches = Activations.batches
    monkeypatch.setattr(Activations, "batches", lambda self, site, size=0: batches(self, site, 37))
    blocks = fit(name, store.open_activations(folder), unit, null_draws=9)
    assert torch.allclose(whole.basis, blocks.basis, atol=1e-5)
    assert torch.allclose(whole.scale, blocks.scale, rtol=1e-4)
    assert whole.found == blocks.found


def test_says_where_it_came_from_and_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    from subspace_probe.core.subspaces import Subspace

    x, labels, unit = data(name)
    acts = replace(activations(x, labels), notes={"model": "tiny", "fingerprint": "f", "data_hash": "h"})
    made = fit(name, acts, unit, null_draws=9)
    assert made.notes["finder"] == name
    assert made.notes["settings"]["null_draws"] == 9
    assert made.notes["data_hash"] == "h"
    assert made.notes["residual_norm"] == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-4)
    back = Subspace.load(made.save(tmp_path / "direction.safetensors"))
    assert back.notes == made.notes
    assert torch.equal(back.basis, made.basis)
    assert (back.reader is None) == (made.reader is None)
    assert torch.equal(back.reject(x), made.reject(x))


def test_names_rows_that_are_not_finite(name: str) -> None:
    from subspace_probe.core.errors import ShapeError

    x, labels, unit = data(name)
    x[17, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"L0\.resid_post are not finite in 1 rows \(17\)"):
        fit(name, activations(x, labels), unit, null_draws=0)


def test_a_missing_class_is_an_error(name: str) -> None:
    from subspace_probe.core.errors import DataError

    x, labels, unit = data(name)
    with pytest.raises(DataError, match="no rows of label 1"):
        fit(name, activations(x, torch.zeros_like(labels)), unit, null_draws=0)
