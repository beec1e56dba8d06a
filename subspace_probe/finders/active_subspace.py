"""The directions a behaviour is sensitive to: eigenvectors of the second moment of its gradients."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, RankError
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.interventions.gradients import metric_gradients
from subspace_probe.linalg.bases import random_directions
from subspace_probe.linalg.permutations import permutation_p
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel

_SHOWN = 32


@final
@dataclass(frozen=True)
class ActiveSubspace:
    """What the output uses at a site: top eigenvectors of C = mean of g g^T, g the objective's gradient by the state.

    The active subspace of Constantine, Dow & Wang 2014 (arXiv:1304.2070), on prompts in place of a density. Labels play
    no part. The scale of a row is the root of its eigenvalue: the root mean square slope of the objective along it, in
    objective units per activation unit (unit "gradient"). A positive coordinate raises the objective on average; the
    origin is the mean state.

    It counts as found when the largest eigenvalue exceeds 95 % of those of gradients of the same lengths in random
    directions. That says that prompts agree on a direction, not that few directions suffice: `notes["energy"]` does.
    Gradients are local: a step that saturates the objective is invisible at its far end. `along` averages them over the
    way to the other prompt of the pair, where their product with the whole step is the effect of the patch (the
    completeness of integrated gradients; Sundararajan et al. 2017, arXiv:1703.01365, proposition 1).

    Args:
        objective: name of a metric, or a metric; it must be differentiable.
        rank: how many directions. None keeps those whose eigenvalue is above the 95 % point of the null's largest, and
            at least one. The null keeps the lengths of all gradients, so one very strong direction hides weak ones.
        along: points on the straight way from each state to the mean of the other label's states in its pair, at the
            middles of as many equal parts; 0 takes the gradient at the state itself.
        null_draws: draws of random directions behind `found`; 0 skips the test.
        seed: of the draws.
        batch_tokens: how many tokens, pads included, one pass may have.
    """

    name: ClassVar[str] = "active_subspace"
    cost: ClassVar[str] = "one forward and backward pass above the site (times `along`), O(n d min(n, d))"
    use: ClassVar[str] = "which directions of a site the behaviour is sensitive to, labels aside"

    objective: Metric | str = "logit_difference"
    rank: int | None = 1
    along: int = 0
    null_draws: int = 19
    seed: int = 0
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.along < 0 or self.null_draws < 0:
            raise ConfigError(
                f"rank={self.rank}, along={self.along}, null_draws={self.null_draws} were given. A rank starts at 1 "
                "(or is None), the others at 0."
            )
        if self.rank is None and self.null_draws == 0:
            raise ConfigError("rank=None takes the rank from the null, but null_draws=0 draws none. Give a rank.")

    def fit(
        self, model: HookedModel, contrast: Contrast, site: Site, where: Where, *, progress: bool = False
    ) -> Subspace:
        """The active subspace at a site, from the prompts of a contrast.

        Args:
            where: one token a prompt; with several, every token's gradient counts alike.

        Raises:
            ConfigError: an objective without a gradient; `along` with several tokens a prompt.
            DataError: `along` with prompts whose pair has no other label.
            RankError: more directions than the gradients span.
            PositionError, SiteError: what was asked for does not exist.
        """
        site = site.resolve(model.spec.n_layers)
        metric = metric_for(self.objective, model)
        acts = model.capture(contrast, sites=site, where=where, batch_tokens=self.batch_tokens)
        states = acts.at(site).cpu()
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        gradients = self._gradients(model, acts, states, site, metric, progress)
        values, basis = active_directions(gradients)
        null = self._null(gradients)
        idle = float(values[0]) == 0.0
        p = permutation_p(float(values[0]), null, side="greater") if len(null) else float("nan")
        edge = float(null.quantile(0.95)) if len(null) else None
        rank = 1 if idle else self._rank(values, edge)
        idleness = f"Nothing downstream of {site.short} at {where} reaches the objective: every gradient is zero."
        return Subspace(
            basis=basis[:rank].float(),
            scale=values[:rank].sqrt().float(),
            origin=states.double().mean(0).float(),
            site=site,
            where=where,
            found=not (idle or p > 0.05),
            scale_unit="gradient",
            notes={
                **self._described(acts, states),
                **acts.notes,
                "eigenvalues": values[: max(rank, _SHOWN)].tolist(),
                "energy": 0.0 if idle else float(values[:rank].sum() / values.sum()),
                "mean_gradient_norm": float(gradients.double().norm(dim=1).mean()),
                "null_eigenvalue_95": edge,
                "p": p if len(null) else None,
                **({"reason": idleness} if idle else {}),
            },
        )

    def _described(self, acts: Activations, states: Float[Tensor, "n d"]) -> dict[str, object]:
        fields = ("rank", "along", "null_draws", "seed", "batch_tokens")
        return {
            "finder": self.name,
            "settings": {"objective": name_of(self.objective), **{name: getattr(self, name) for name in fields}},
            "orientation": "raises the objective on average",
            "n": len(states),
            "prompts": len(acts.contrast),
            "residual_norm": float(states.double().norm(dim=1).mean()),
        }

    def _null(self, gradients: Float[Tensor, "n d"]) -> Float64[Tensor, " draws"]:
        """Largest eigenvalues of gradients as long in random directions."""
        (n, d), top = gradients.shape, torch.empty(self.null_draws, dtype=torch.float64)
        lengths = gradients.double().norm(dim=1).sort().values[:, None]  # sorted: the order of prompts is nothing
        for draw in range(self.null_draws):
            rows = random_directions(n, d, seed=self.seed + draw, dtype=torch.float64) * lengths
            top[draw] = torch.linalg.eigvalsh(rows @ rows.T if n < d else rows.T @ rows)[-1] / n
        return top

    def _gradients(
        self,
        model: HookedModel,
        acts: Activations,
        states: Float[Tensor, "n d"],
        site: Site,
        metric: Metric,
        progress: bool,
    ) -> Float[Tensor, "n d"]:
        gradients = partial(
            metric_gradients, model, acts.contrast.prompts, site, acts.where, metric,
            batch_tokens=self.batch_tokens, progress=progress,
        )  # fmt: skip
        if not self.along:
            return gradients()
        if not acts.where.single:
            raise ConfigError(f"along={self.along} needs one token a prompt, but {str(acts.where)!r} is many. Use one.")
        step = _partners(states, acts) - states
        points = [(part + 0.5) / self.along for part in range(self.along)]
        return torch.stack([gradients(states=states + point * step) for point in points]).mean(0)

    def _rank(self, values: Float64[Tensor, " k"], edge: float | None) -> int:
        if self.rank is None:
            return max(1, int((values > (edge or 0.0)).sum()))
        spanned = int((values > 1e-12 * values[0]).sum())  # gradients are float32: 1e-6 of the largest, squared
        if self.rank > spanned:
            raise RankError(
                f"rank={self.rank} was asked for, but the gradients span {spanned} directions. Ask for fewer, or give "
                "more prompts."
            )
        return self.rank


def active_directions(
    gradients: Float[Tensor, "n d"],
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k d"]]:
    """Eigenvalues, largest first, and eigenvectors of the uncentred second moment (1/n) sum of g g^T.

    Computed in float64 from the singular values of the gradients, so that small eigenvalues keep their digits. The
    mean gradient has no negative coordinate.

    Returns:
        k = min(n, d) eigenvalues in squared gradient units, and as many orthonormal rows.
    """
    rows = gradients.detach().to("cpu", torch.float64)
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    signs = torch.where(basis @ rows.mean(0) < 0, -1.0, 1.0).double()
    return singular.square() / len(rows), basis * signs[:, None]


def _partners(states: Float[Tensor, "n d"], acts: Activations) -> Float[Tensor, "n d"]:
    """For every row the mean of its pair's states of the other label."""
    labels, (_, pair) = acts.labels, acts.pairs.unique(return_inverse=True)
    sums = states.new_zeros(2, int(pair.max()) + 1, states.shape[1])
    sums = sums.index_put((labels, pair), states, accumulate=True)
    counts = torch.zeros(sums.shape[:2]).index_put((labels, pair), torch.ones(len(labels)), accumulate=True)
    others = counts[1 - labels, pair]
    if alone := int((others == 0).sum()):
        raise DataError(
            f"{alone} of {len(labels)} prompts have no prompt of the other label in their pair, so there is no way to "
            "go along. Give 'pair' numbers, or along=0."
        )
    return sums[1 - labels, pair] / others[:, None].to(states.dtype)
