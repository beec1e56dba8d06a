"""How alike are two subspaces, beside how alike unrelated ones of the same data are."""

from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float64
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError, SiteError
from subspace_probe.core.findings import Finding, Interval, Verdict
from subspace_probe.core.intervals import range_of
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.linalg import angles, nulls
from subspace_probe.linalg.moments import Moments
from subspace_probe.linalg.permutations import permutation_p

CHANCE = "random pairs with the covariance of the states"
"""What a range by chance was drawn from, in words."""


@final
@dataclass(frozen=True)
class Similarity:
    """How alike two subspaces are, with what chance gives.

    Attributes:
        kind: "cosine", signed, between two directions; else "overlap", the mean squared cosine of the principal angles.
        value: of that kind.
        angles: the principal angles in radians, smallest first.
        null: the range that holds 95 % of unrelated pairs of the same ranks, drawn from the covariance of the data's
            own states; None without activations.
        isotropic: what the dimension alone would say, for contrast and never for judging: the cosine that 95 % of
            random directions stay below in size, or the expected overlap max(k, l) / d. Activations vary along few
            directions, so it is far too small.
        p: share of unrelated pairs as alike as these (cosines by size); NaN without activations.
        n: rows behind the null.
    """

    kind: Literal["cosine", "overlap"]
    value: float
    angles: tuple[float, ...]
    null: Interval | None
    isotropic: float
    p: float
    n: int

    @property
    def verdict(self) -> Verdict:
        """Supported where more alike than the null's range, else inconclusive; unaudited where there is no null.

        Never refuted: unrelated directions and directions that are hard to estimate look the same from here.
        """
        if self.null is None:
            return "unaudited"
        apart = self.value > self.null.high or (self.kind == "cosine" and self.value < self.null.low)
        return "supported" if apart else "inconclusive"

    def finding(self, name: str, claim: str) -> Finding:
        """As a line of a report.

        Args:
            name: dotted and stable, as of every finding.
            claim: the sentence that the verdict is about: that the two are related.
        """
        return Finding(
            name, claim, self.value, None, self.null, self.n, self.verdict, note=f"{self}; an estimate without interval"
        )

    def __str__(self) -> str:
        if self.null is None:
            chance = "no null: compare with activations to get one"
        else:
            chance = (
                f"by chance {self.null.low:+.2f} to {self.null.high:+.2f} with this data's covariance, p={self.p:.2g}"
            )
        return f"{self.kind} {self.value:+.3f} ({chance}; isotropic {self.isotropic:.2g})"


def compare_subspaces(
    a: Subspace,
    b: Subspace,
    acts: Activations | None = None,
    *,
    acts_b: Activations | None = None,
    draws: int = 500,
    seed: int = 0,
) -> Similarity:
    """Cosine of two directions, or overlap of two subspaces, with its null.

    The null draws directions from the covariance of all rows at each subspace's site, one pass a site. A subspace
    without a site is looked for where the other one is, or at the only site captured.

    Args:
        acts: activations with the sites of both; None leaves the similarity unaudited.
        acts_b: those of `b`, where it was found at other tokens.
        draws: unrelated pairs.
        seed: of the draws.

    Raises:
        ShapeError: subspaces of different widths.
        StaleStore: subspaces found in different models; `for_any_model` lifts the check.
        ConfigError: no draws.
        SiteError: a site that these activations do not hold.
        DataError: fewer rows than the ranks need.
    """
    a.require_width(b.width)
    if (other := b.notes.get("fingerprint")) is not None:
        a.require_model(str(other))
    if draws < 1:
        raise ConfigError(f"draws={draws} was given. A null takes at least one draw; leave acts out to have none.")
    one = a.rank == b.rank == 1
    between = angles.principal_angles(a.basis.double(), b.basis.double())
    # of unit vectors: a direction of length zero has no cosine of its own
    value = angles.cosine(a.basis[0].double(), b.basis[0].double()) if one else a.overlap(b)
    isotropic = (
        nulls.isotropic_cosine_quantile(a.width, 0.975)
        if one and a.width > 1
        else nulls.chance_overlap(a.rank, b.rank, a.width)
    )
    null, p, n = None, float("nan"), 0
    if acts is not None:
        drawn, n = _null((a, acts), (b, acts if acts_b is None else acts_b), draws=draws, seed=seed)
        null = range_of(drawn, CHANCE)
        p = permutation_p(abs(value), drawn.abs(), side="greater")
    return Similarity("cosine" if one else "overlap", value, tuple(between.tolist()), null, isotropic, p, n)


def state_covariance(acts: Activations, site: Site) -> Float64[Tensor, "d d"]:
    """Covariance of all states at a site, a block at a time.

    Raises:
        SiteError: a site that was not captured.
        DataError: fewer than two rows.
    """
    if acts.rows.n < 2:
        raise DataError(f"The covariance at {site.short} was asked for, but there are {acts.rows.n} rows. Add prompts.")
    moments = Moments.empty(acts.width(site))
    for block, _ in acts.batches(site):
        moments = moments.update(block)
    return moments.covariance()


def _null(
    first: tuple[Subspace, Activations], second: tuple[Subspace, Activations], *, draws: int, seed: int
) -> tuple[Float64[Tensor, " draws"], int]:
    """Similarities of unrelated pairs, and the smaller number of rows behind the two covariances."""
    (a, acts), (b, acts_b) = first, second
    site, site_b = _site(a, b, acts), _site(b, a, acts_b)
    for subspace, source in (first, second):
        if subspace.rank >= source.rows.n:
            raise DataError(
                f"The null of a subspace of rank {subspace.rank} was asked for from {source.rows.n} rows; their "
                "covariance has a lower rank. Add prompts, or compare without activations."
            )
    covariance = state_covariance(acts, site)
    other = None if acts is acts_b and site == site_b else state_covariance(acts_b, site_b)
    n = min(acts.rows.n, acts_b.rows.n)
    if a.rank == b.rank == 1:
        return nulls.cosine_null(covariance, covariance_b=other, n=draws, seed=seed), n
    return nulls.overlap_null(covariance, a.rank, b.rank, covariance_b=other, n=draws, seed=seed), n


def _site(own: Subspace, other: Subspace, acts: Activations) -> Site:
    """Where to look for the states of a subspace."""
    site = own.site or other.site or (acts.sites[0] if len(acts.sites) == 1 else None)
    if site is None:
        raise SiteError(
            f"Neither subspace says its site, and these activations hold {len(acts.sites)}. "
            "Use subspace.moved(site), or capture one site."
        )
    own.require_width(acts.width(site))
    return site
