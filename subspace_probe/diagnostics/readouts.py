"""How well a direction reads a label, and what it says at the unembedding. Reading is not using: see the checks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding
from subspace_probe.core.intervals import auroc_of, range_of
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.permuting import permuted_codes
from subspace_probe.linalg.ranking import auroc
from subspace_probe.models.hooked import HookedModel


def coordinate(fit: Subspace, acts: Activations, site: Site) -> Tensor:
    """Coordinate along the direction about its origin, shape [n]."""
    return fit.coords(acts.at(site).double())[:, 0]


def layer_curve(
    fits: Mapping[Site, Subspace], acts: Activations, direction: str, *, seed: int
) -> list[dict[str, object]]:
    """AUROC of each site's direction on some activations: rows of the layer figure."""
    rows: list[dict[str, object]] = []
    for site, fit in fits.items():
        value, spread = auroc_of(coordinate(fit, acts, site), acts.labels, acts.groups, seed=seed)
        rows.append(
            {
                "site": site.short,
                "layer": site.layer,
                "position": str(acts.where),
                "direction": direction,
                "auroc": value,
                "low": spread.low,
                "high": spread.high,
                "chosen": False,
            }
        )
    return rows


def guard_finding(
    name: str, claim: str, fit: Subspace, acts: Activations, site: Site, *, seed: int, expected: Expectation
) -> Finding:
    """AUROC of a direction as a guard, against shuffled labels of the same prompts."""
    scores, labels = coordinate(fit, acts, site), acts.labels
    value, spread = auroc_of(scores, labels, acts.groups, seed=seed)
    shuffled = [auroc(scores, permuted_codes(acts, labels, seed=draw)) for draw in range(seed, seed + 200)]
    null = range_of(torch.tensor(shuffled), "the same scores under 200 shuffles of the labels")
    finding = Finding(name, claim, value, spread, null, len(labels), expected=expected)
    return finding.judged("above", margin=0.05, no_effect=0.5)


def promoted_tokens(model: HookedModel, direction: Subspace, name: str, *, k: int = 10) -> list[dict[str, object]]:
    """Tokens that a direction raises and lowers most at the unembedding (logit lens, final norm left out)."""
    try:
        unembedding = model.backend.unembedding().float()
    except ConfigError:  # an encoder
        return []
    weights = unembedding @ direction.vector.to(unembedding)
    weights = weights - weights.mean()
    rows: list[dict[str, object]] = []
    for promoted, order in ((True, weights.argsort(descending=True)), (False, weights.argsort())):
        for rank, token in enumerate(order[:k].tolist()):
            text = model.tokenizer.decode([token])
            weight = float(weights[token])
            rows.append({"direction": name, "rank": rank, "token": text, "weight": weight, "promoted": promoted})
    return rows
