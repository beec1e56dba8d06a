"""Edits of states through few features of a dictionary, without knowing what any feature means.

Which features of one state, exchanged for those of another, bring it nearest to the other (Makelov, Lange & Nanda 2024,
arXiv:2405.08366, section 4.2): min over R, A with |R u A| <= k of |a_s - sum_R f_i u_i + sum_A f_j u_j - a_t|.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError, ShapeError
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder


@final
@dataclass(frozen=True, eq=False)
class SparseEdit:
    """States after an edit of few features.

    Attributes:
        states: shape [n, d].
        changed: the features, in the order chosen; -1 where none brought the state nearer, shape [n, k].
        removed: share of the source's reconstruction that was taken out, see `feature_weights`, shape [n].
    """

    states: Float[Tensor, "n d"]
    changed: Int[Tensor, "n k"]
    removed: Float[Tensor, " n"]


def sparse_edits(
    sae: SparseAutoencoder, source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], budgets: tuple[int, ...]
) -> dict[int, SparseEdit]:
    """Exchange the features that bring each source state nearest to its target, one after the other.

    Greedy, since the exact problem is a subset sum. A feature that is active in both states counts once: it is set to
    the target's value. The states themselves are edited, not their reconstructions, so what the autoencoder misses
    stays. One search serves all budgets, as a larger one only continues a smaller.

    Args:
        source: states to be edited.
        target: the state each is to become.
        budgets: how many features may change; each gives one edit.

    Raises:
        ConfigError: no budget, or one below 1.
        ShapeError: not as many targets as sources.
    """
    if not budgets or min(budgets) < 1:
        raise ConfigError(f"Budgets {budgets} were given. Give at least one, of at least 1 feature.")
    if source.shape != target.shape:
        raise ShapeError(f"{tuple(source.shape)} sources and {tuple(target.shape)} targets were given. Give pairs.")
    before, after = (sae.encode(x) * sae.gain(x) for x in (source, target))
    weight = feature_weights(sae, source)
    # few features are active in either state: gather these, so that no step touches all of the dictionary
    union = (before != 0) | (after != 0)
    width = max(1, int(union.sum(1).max()))
    ids = union.double().topk(width, dim=1).indices
    step = (after - before).gather(1, ids)
    moves = (step[..., None] * sae.decoder[ids]).to(source.dtype)
    free, shares = union.gather(1, ids), weight.gather(1, ids)
    x, removed = source.clone(), torch.zeros(len(source), dtype=torch.float64)
    chosen = torch.full((len(source), max(budgets)), -1)
    rows, sizes = torch.arange(len(source)), moves.double().square().sum(-1)
    found: dict[int, SparseEdit] = {}
    for k in range(1, max(budgets) + 1):
        change = sizes + 2 * torch.einsum("nmd,nd->nm", moves.double(), (x - target).double())
        best = change.masked_fill(~free, float("inf")).argmin(1)
        better = free[rows, best] & (change[rows, best] < 0)
        x = x + moves[rows, best] * better[:, None]
        removed = removed + shares[rows, best] * better
        chosen[:, k - 1] = torch.where(better, ids[rows, best], -1)
        free = free.index_put((rows, best), torch.zeros_like(better))
        if k in budgets:
            found[k] = SparseEdit(x, chosen[:, :k].clone(), removed)
    return found


def exchanged(
    sae: SparseAutoencoder,
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    features: Int[Tensor, "n k"],
) -> SparseEdit:
    """Set stated features to the target's values.

    Args:
        features: which, for each pair; -1 for none.
    """
    before, after = (sae.encode(x) * sae.gain(x) for x in (source, target))
    named = torch.zeros_like(before, dtype=torch.bool)
    rows, columns = (features >= 0).nonzero(as_tuple=True)
    named[rows, features[rows, columns]] = True
    states = source + (((after - before) * named) @ sae.decoder).to(source.dtype)
    return SparseEdit(states, features, (feature_weights(sae, source) * named).sum(1))


def feature_weights(sae: SparseAutoencoder, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
    """Each feature's share of its state's reconstruction, f_i u_i.(ahat - b) / |ahat - b|^2, in float64.

    The shares of a state sum to 1; all are 0 where nothing is active.
    """
    active = (sae.encode(x) * sae.gain(x)).double()
    decoder = sae.decoder.double()
    whole = active @ decoder
    size = whole.square().sum(1, keepdim=True)
    return torch.where(size > 0, active * (whole @ decoder.T) / size.clamp(min=1e-300), 0.0)
