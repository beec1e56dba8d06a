"""How differently latents are active in two classes, under the labels as they are and under permuted ones.

Latents are mostly zero, so only what is not is kept or summed: the cost is that of the active ones.
"""

from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy import sparse
from torch import Tensor

Statistic = Literal["d_prime", "mean_difference", "auroc"]

_SPREAD = 1e-6
"""Least deviation within classes, as a share of a latent's root mean square: what is below it is rounding."""


@final
class LatentContrast:
    """Sums over latent activations that stream by, and the statistics that follow from them.

    Args:
        norms: length of each latent's decoder row.
        labels: one labelling a row, the true one first; True positive.
        statistic: which one is wanted. "auroc" keeps the active latents of all rows; the others keep sums only.
    """

    def __init__(self, norms: Float[Tensor, " d_sae"], labels: Bool[Tensor, "draws n"], statistic: Statistic) -> None:
        self.norms, self.labels, self.statistic = norms.double().cpu(), labels, statistic
        d_sae = len(norms)
        self._rows = 0
        self._sums = np.zeros((d_sae, len(labels)))  # of positives, under every labelling
        self._total, self._squares = np.zeros(d_sae), np.zeros(d_sae)
        self._active, self._means, self._contributions = (np.zeros((d_sae, 2)) for _ in range(3))
        self._kept: list[Any] = []

    def add(self, latents: Float[Tensor, "b d_sae"], gain: Float[Tensor, "b 1"]) -> None:
        """The next rows, in the order of the labels.

        Args:
            gain: what their decoded states are multiplied by.
        """
        part: Any = sparse.csr_array(latents.detach().cpu().numpy().astype(np.float64))
        labels = self.labels[:, self._rows : self._rows + len(latents)].T.double().numpy()
        weight = gain.detach().double().cpu().numpy()
        classes = np.stack([1 - labels[:, 0], labels[:, 0]], axis=1)
        self._rows += len(latents)
        self._active += (part != 0).astype(np.float64).T @ classes
        self._means += part.T @ classes
        self._contributions += part.T @ (classes * weight)
        if self.statistic == "auroc":
            self._kept.append(part.astype(np.float32))
            return
        weight = weight if self.statistic == "mean_difference" else np.ones_like(weight)
        self._sums += part.T @ (labels * weight)
        self._total += part.T @ weight[:, 0]
        self._squares += part.power(2).sum(axis=0)

    @property
    def rates(self) -> Float64[Tensor, "d_sae 2"]:
        """Share of the rows of each class, negatives first, in which each latent is active."""
        return torch.from_numpy(self._active / self._sizes(0))

    @property
    def rate(self) -> Float64[Tensor, " d_sae"]:
        """Share of all rows in which each latent is active."""
        return torch.from_numpy(self._active.sum(axis=1) / self._rows)

    @property
    def means(self) -> Float64[Tensor, "d_sae 2"]:
        """Mean activation of each latent in each class, negatives first."""
        return torch.from_numpy(self._means / self._sizes(0))

    @property
    def contribution(self) -> Float64[Tensor, " d_sae"]:
        """Difference of class means of activation times length of the decoder row, in activation units."""
        means = torch.from_numpy(self._contributions / self._sizes(0))
        return (means[:, 1] - means[:, 0]) * self.norms

    def values(self) -> Float64[Tensor, "draws d_sae"]:
        """The statistic of every latent under every labelling: 0 for none, positive for more in the positives."""
        if self.statistic == "auroc":
            return self._aurocs()
        n1, n0 = (torch.tensor([self._sizes(draw)[c] for draw in range(len(self.labels))])[:, None] for c in (1, 0))
        positive, total = torch.from_numpy(self._sums).T, torch.from_numpy(self._total)
        mean1, mean0 = positive / n1.clamp(min=1), (total - positive) / n0.clamp(min=1)
        gap = torch.where((n1 > 0) & (n0 > 0), mean1 - mean0, 0.0)
        if self.statistic == "mean_difference":
            return gap * self.norms
        squares = torch.from_numpy(self._squares)
        within = (squares - n1 * mean1.square() - n0 * mean0.square()) / max(self._rows - 2, 1)
        floor = _SPREAD**2 * squares / self._rows
        return torch.where(squares > 0, gap / within.clamp(min=floor).sqrt(), 0.0)

    def _sizes(self, draw: int) -> tuple[int, int]:
        positives = int(self.labels[draw, : self._rows].sum())
        return self._rows - positives, positives

    def _aurocs(self) -> Tensor:
        """AUROC - 1/2, ties counting one half: sums of mid-ranks, of which only the active rows' are added up."""
        active: Any = sparse.vstack(self._kept, format="csc")
        zeros = self._rows - np.diff(active.indptr)
        ranked = sparse.csc_array((_ranks(active, zeros), active.indices, active.indptr), shape=active.shape)
        labels = self.labels[:, : self._rows].double().numpy()
        n1 = labels.sum(axis=1)
        sums = (ranked.T @ labels.T).T + n1[:, None] * (zeros + 1) / 2
        pairs = np.maximum(n1 * (self._rows - n1), 1)
        aurocs = (sums - (n1 * (n1 + 1) / 2)[:, None]) / pairs[:, None] - 0.5
        return torch.from_numpy(np.where((n1 * (self._rows - n1) > 0)[:, None], aurocs, 0.0))


def _ranks(active: Any, zeros: Any) -> Any:
    """Mid-rank of every active entry within its column, less the mid-rank of the column's zeros."""
    column = np.repeat(np.arange(active.shape[1]), np.diff(active.indptr))
    order = np.lexsort((active.data, column))
    column, data = column[order], active.data[order]
    new = np.ones(len(data), dtype=bool)
    new[1:] = (column[1:] != column[:-1]) | (data[1:] != data[:-1])
    start = np.flatnonzero(new)
    stop = np.append(start[1:], len(data))
    middle = np.repeat((start + stop - 1) / 2, stop - start) - active.indptr[column]
    out = np.empty(len(data))
    out[order] = middle + 1 + zeros[column] - (zeros[column] + 1) / 2
    return out
