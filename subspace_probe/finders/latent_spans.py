"""Which latents of a dictionary belong to a topic, which do not, and what the decoder rows of each span.

The first two steps of SSPU (Wang et al. 2025, arXiv:2505.24428). The published description names no score: latents are
ranked here by the statistic of `SAELatents` with its sign. The lowest of *all* latents would mostly be dead ones, whose
decoder rows are as they were drawn, so only latents that are active often enough are ranked, and the rest counted.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.sites import Site
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.contrasting import LatentContrast
from subspace_probe.finders.permuting import permuted_labels
from subspace_probe.linalg.angles import principal_angles
from subspace_probe.linalg.projections import reject
from subspace_probe.linalg.spans import Span, span_of


@final
@dataclass(frozen=True, eq=False)
class LatentSpans:
    """Latents by how much they belong to label 1, and the spans of the two ends.

    Attributes:
        score: d' of each latent between the labels, positive for more in label 1, shape [d_sae]; 0 for unranked ones.
        rate: share of the rows in which each is active, shape [d_sae].
        ranked: those that are active often enough, shape [d_sae].
        top, bottom: the highest and the lowest scored of those, best first, shape [m].
        relevant, irrelevant: what their decoder rows span.
        angles: principal angles between the two spans, radians, smallest first, before one was taken off the other.
        null_95: 95th percentile of the largest |score| under permuted labels; NaN without draws.
    """

    score: Float64[Tensor, " d_sae"]
    rate: Float64[Tensor, " d_sae"]
    ranked: Bool[Tensor, " d_sae"]
    top: Int[Tensor, " m"]
    bottom: Int[Tensor, " m"]
    relevant: Span
    irrelevant: Span
    angles: Float64[Tensor, " a"]
    null_95: float

    @property
    def dead(self) -> int:
        """Latents that were not ranked."""
        return int((~self.ranked).sum())


def latent_spans(
    sae: SparseAutoencoder,
    acts: Activations,
    site: Site,
    *,
    k: int = 24,
    least_rate: float = 0.01,
    tolerance: float = 0.05,
    disjoint: bool = False,
    null_draws: int = 0,
    seed: int = 0,
) -> LatentSpans:
    """Rank latents by d' between label 1 and label 0 and span the decoder rows of both ends.

    Args:
        acts: of prompts with labels: 1 what is to be forgotten, 0 what is to be kept; any number of tokens a prompt.
        k: latents at each end.
        least_rate: latents that are active in a smaller share of the rows are not ranked.
        tolerance: singular values below this share of the largest are left out of a span.
        disjoint: take the relevant span off the irrelevant rows first, so that the two are orthogonal.
        null_draws: label permutations behind `null_95`.
        seed: of the permutations.

    Raises:
        SiteError: the dictionary was trained at another site.
        ConfigError: `k` below 1, or so large that the two ends meet.
        DataError: a class without rows, or irrelevant rows that lie in the relevant span.
    """
    sae.require_site(site)
    sae.require_width(acts.width(site))
    counts = torch.bincount(acts.labels, minlength=2).tolist()
    if min(counts) < 1:
        raise DataError(f"Latents were to be ranked between labels with {counts[1]} and {counts[0]} rows. Add prompts.")
    permuted = [permuted_labels(acts, seed=seed + draw).bool() for draw in range(null_draws)]
    seen = LatentContrast(sae.decoder.norm(dim=1), torch.stack([acts.labels.bool(), *permuted]), "d_prime")
    for block, _ in acts.batches(site, size=1024):
        with torch.no_grad():
            seen.add(sae.encode(block.to(sae.device)), sae.gain(block.to(sae.device)))
    ranked = (seen.rate >= max(least_rate, 1 / acts.rows.n)) & (seen.norms > 0)
    alive = int(ranked.sum())
    if k < 1 or 2 * k > alive:
        raise ConfigError(
            f"k={k} latents at each end were asked for, but {alive} of {sae.d_sae} are active in at least "
            f"{least_rate:.2%} of {acts.rows.n} rows. Choose k from 1 to {alive // 2}, or lower least_rate."
        )
    values = torch.where(ranked, seen.values(), 0.0)
    order = torch.where(ranked, values[0], -torch.inf).argsort(descending=True, stable=True)[:alive]
    top, bottom = order[:k], order[-k:].flip(0)
    decoder = sae.decoder.detach().cpu().float()
    relevant = span_of(decoder[top], tolerance=tolerance)
    plain = span_of(decoder[bottom], tolerance=tolerance)
    left = reject(decoder[bottom], relevant.basis) if disjoint else decoder[bottom]
    if disjoint and float(left.norm(dim=1).max()) < tolerance * float(decoder[bottom].norm(dim=1).max()):
        raise DataError(
            f"The decoder rows of the {k} lowest latents lie in the span of the {k} highest. Lower k, or set "
            "disjoint=False."
        )
    return LatentSpans(
        values[0],
        seen.rate,
        ranked,
        top,
        bottom,
        relevant,
        span_of(left, tolerance=tolerance) if disjoint else plain,
        principal_angles(relevant.basis, plain.basis),
        float(values[1:].abs().amax(1).quantile(0.95)) if null_draws else float("nan"),
    )
