"""Latents of a sparse autoencoder that tell the classes apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final, get_args

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError, RankError
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.contrasting import LatentContrast, Statistic
from subspace_probe.dictionaries.loading import load_sae
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.permuting import permuted_labels
from subspace_probe.linalg.bases import orthonormalise
from subspace_probe.linalg.moments import Moments
from subspace_probe.linalg.permutations import permutation_p

_CELLS = 2**23
"""Latent activations held at once, in float64: 64 MB."""


@final
@dataclass(frozen=True)
class SAELatents:
    """The decoder rows of the latents whose activation differs most between the classes.

    Latents are ranked by the absolute value of a statistic of their activations. The best is compared with the best of
    all latents under permuted labels (Westfall & Young 1993, max-T), so that choosing among thousands is paid for. A
    row of the basis points where its latent raises the activations of label 1; rows after the first are orthogonal to
    those before. The scale is the difference of the latent's mean contribution, activation times length of its decoder
    row, in activation units; the origin is the midpoint of the class means.

    Args:
        sae: a folder with a sparse autoencoder, or one that was loaded.
        k: how many latents.
        statistic: "d_prime", the difference of means over the pooled deviation within classes; "mean_difference", in
            activation units, which favours latents with large activations; "auroc", by ranks, exact. The first two
            are summed as rows stream by; the last keeps every nonzero activation, some 12 bytes each.
        least_rate: latents that are active in a smaller share of all rows are not ranked.
        null_draws: label permutations behind `found`; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "sae_latents"
    cost: ClassVar[str] = "one pass, O(n d d_sae) and null_draws sums over the active latents"
    use: ClassVar[str] = "a dictionary of the site exists, and a named latent is wanted rather than a mixture"

    sae: str | Path | SparseAutoencoder
    k: int = 1
    statistic: Statistic = "d_prime"
    least_rate: float = 0.01
    null_draws: int = 199
    seed: int = 0

    def __post_init__(self) -> None:
        if self.statistic not in get_args(Statistic):
            raise ConfigError(f"statistic={self.statistic!r} is not known. Known: {', '.join(get_args(Statistic))}.")
        if self.k < 1 or self.null_draws < 0 or not 0 <= self.least_rate < 1:
            raise ConfigError(
                f"SAELatents was given k={self.k}, null_draws={self.null_draws}, least_rate={self.least_rate}. "
                "They must be at least 1, at least 0, and from 0 to below 1."
            )

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """Fit on activations, in memory or on disk.

        Raises:
            SiteError: the autoencoder was trained at another site.
            ShapeError: states of another width, or non-finite ones.
            DataError: a class without rows; fewer than k latents that are active often enough.
            RankError: the decoder rows of the best k latents are linearly dependent.
            StoreError, ConfigError: the autoencoder cannot be read.
        """
        sae = self._loaded()
        fitting = Fitting(self, acts, site)
        seen = self._measured(fitting, sae)
        notes: dict[str, Any] = {
            "sae": {
                "key": sae.key,
                "path": None if isinstance(self.sae, SparseAutoencoder) else str(self.sae),
                "architecture": sae.architecture,
                "d_sae": sae.d_sae,
                "hook_name": sae.metadata.get("hook_name"),
                "model_name": sae.metadata.get("model_name"),
            },
            "ranked_latents": int(seen.eligible.sum()),
        }
        best = seen.order[: self.k]
        if len(best) == 0:
            zero, eye = torch.zeros(self.k), torch.eye(self.k, sae.d_in)
            return fitting.result(
                eye,
                zero,
                (seen.negative + seen.positive) / 2,
                found=False,
                orientation="none",
                notes={**notes, "latents": [], "p": None},
            )
        if len(best) < self.k:
            raise DataError(
                f"k={self.k} latents were asked for, but only {len(best)} of {sae.d_sae} are active in at least "
                f"{self.least_rate:.2%} of {acts.rows.n} rows. Lower k or least_rate."
            )
        signs = seen.statistic[best].sign()
        rows = sae.decoder[best].double().cpu() * torch.where(signs < 0, -1.0, 1.0)[:, None]
        try:
            basis = orthonormalise(rows)
        except ValueError as error:
            raise RankError(f"The decoder rows of latents {best.tolist()} span no {self.k} axes: {error}") from None
        ps = seen.p(best)
        return fitting.result(
            basis,
            seen.contrast.contribution[best].abs(),
            (seen.negative + seen.positive) / 2,
            found=not (ps and ps[0] > 0.05) and float(seen.statistic[best[0]]) != 0,
            orientation="towards what the latents add to label 1",
            notes={
                **notes,
                **seen.about(best),
                "p": ps[0] if ps else None,
                "null_max_95": float(seen.null.quantile(0.95)) if len(seen.null) else None,
                # negative where what overlaps with the latent turns the coordinate around
                "coordinate_gap": (basis @ (seen.positive - seen.negative)).tolist(),
            },
        )

    def ranked(self, acts: Activations, site: Site, *, top: int = 20) -> Table:
        """The best latents of a site, to look at: statistic, p-value over all latents, and how often each is active."""
        sae = self._loaded()
        seen = self._measured(Fitting(self, acts, site), sae)
        best = seen.order[:top]
        columns = {"rank": range(1, len(best) + 1), **seen.about(best)}
        rows = tuple(zip(*columns.values(), strict=True))
        names = ("rank", "latent", self.statistic, "p", "contribution", "mean_1", "mean_0", "rate_1", "rate_0")
        about = f"Latents of {sae!r} by |{self.statistic}| at {site.short}; positive: more active in label 1."
        return Table(names, rows, about)

    def _loaded(self) -> SparseAutoencoder:
        return self.sae if isinstance(self.sae, SparseAutoencoder) else load_sae(self.sae)

    def _measured(self, fitting: Fitting, sae: SparseAutoencoder) -> "_Measured":
        acts = fitting.acts
        sae.require_site(fitting.site)
        fitting.require_classes(2)
        labels = acts.labels.bool()
        permuted = [permuted_labels(acts, seed=self.seed + draw).bool() for draw in range(self.null_draws)]
        contrast = LatentContrast(sae.decoder.norm(dim=1), torch.stack([labels, *permuted]), self.statistic)
        moments = [Moments.empty(fitting.width, second=False)] * 2
        size = max(1, _CELLS // sae.d_sae)
        for block, classes in fitting.batches():
            sae.require_width(block.shape[1])
            moments = [seen.update(block[classes == label]) for label, seen in enumerate(moments)]
            for rows in block.split(size):
                with torch.no_grad():
                    contrast.add(sae.encode(rows.to(sae.device)), sae.gain(rows.to(sae.device)))
        # a latent that adds nothing has no direction
        eligible = (contrast.rate >= max(self.least_rate, 1 / acts.rows.n)) & (contrast.norms > 0)
        values = torch.where(eligible, contrast.values(), 0.0)
        null = values[1:].abs().amax(dim=1)
        return _Measured(contrast, values[0], null, eligible, moments[0].mean, moments[1].mean)


@final
@dataclass(frozen=True, eq=False)
class _Measured:
    """What one pass over the rows gave."""

    contrast: LatentContrast
    statistic: Float64[Tensor, " d_sae"]
    null: Float64[Tensor, " m"]
    eligible: Bool[Tensor, " d_sae"]
    negative: Float64[Tensor, " d"]
    positive: Float64[Tensor, " d"]

    @property
    def order(self) -> Int[Tensor, " ranked"]:
        """The latents that are ranked, best first; the lower number first among equals."""
        order = self.statistic.abs().argsort(descending=True, stable=True)
        return order[self.eligible[order]]

    def p(self, latents: Int[Tensor, " k"]) -> list[float]:
        """Each latent against the best of all latents under permuted labels; empty without a null."""
        if len(self.null) == 0:
            return []
        return [permutation_p(float(self.statistic[i].abs()), self.null, side="greater") for i in latents]

    def about(self, latents: Int[Tensor, " k"]) -> dict[str, list[Any]]:
        """Columns that describe latents; plain JSON values."""
        rates, means = self.contrast.rates[latents], self.contrast.means[latents]
        return {
            "latents": latents.tolist(),
            "statistics": self.statistic[latents].tolist(),
            "p_values": self.p(latents) or [None] * len(latents),
            "contributions": self.contrast.contribution[latents].tolist(),
            "means_positive": means[:, 1].tolist(),
            "means_negative": means[:, 0].tolist(),
            "rates_positive": rates[:, 1].tolist(),
            "rates_negative": rates[:, 0].tolist(),
        }
