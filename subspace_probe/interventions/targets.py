"""Half-spaces of a site's states, as a probe or a direction draws them: what rerouting aims at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError, RankError, ShapeError, StaleStore
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where


@final
@dataclass(frozen=True, eq=False)
class HalfSpace:
    """The states x with normal . x + bias >= margin, and the way into them.

    Attributes:
        normal: shape [d], not necessarily of unit length; scores are in its units.
        bias: added to the score.
        margin: the score that is asked for.
        site: where it was found.
        where: the tokens it was found at.
        notes: where it comes from; plain JSON values. A "fingerprint" ties it to its model.
        step: the displacement that raises the score by one, shape [d]; `normal . step` is 1, checked. By default the
            shortest one, normal / |normal|^2; see `with_covariance`.
    """

    normal: Float[Tensor, " d"]
    bias: float = 0.0
    margin: float = 0.0
    site: Site | None = None
    where: Where | None = None
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    step: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        normal = self.normal.detach().cpu().double()
        length = float(normal.square().sum())
        if not 0 < length < float("inf"):
            raise ShapeError("The normal of a half-space is zero or not finite. Give a direction of positive length.")
        if not (math.isfinite(self.bias) and math.isfinite(self.margin)):
            raise ConfigError(f"bias={self.bias} and margin={self.margin} were given. Both must be finite numbers.")
        if self.step is not None:
            same = self.step.shape == self.normal.shape
            raised = float(normal @ self.step.detach().cpu().double()) if same else math.nan
            if not abs(raised - 1) < 1e-3:
                raise ShapeError(
                    f"A step of shape {tuple(self.step.shape)} raises the score of a half-space of width {self.width} "
                    f"by {raised:.3g}, but must raise it by 1. Divide it by its dot product with the normal."
                )

    @classmethod
    def of(cls, subspace: Subspace, *, side: int = 1, margin: float = 0.0) -> "HalfSpace":
        """One side of a direction's threshold, which is at the subspace's `origin`.

        The score is the signed coordinate, in activation units. Where the origin is, its finder says: the midpoint of
        the class means for a mean difference and LDA, the decision boundary for a linear probe. With a mean
        difference, a margin of half its `scale` is the mean of the class.

        Args:
            subspace: of rank one; a reader of its own (LEACE) is what reads the coordinate, and is the normal then.
            side: 1 for positive coordinates, which is label 1 for most finders; -1 for the other side.
            margin: how far beyond the threshold, in activation units.

        Raises:
            RankError: a subspace of higher rank.
            ConfigError: another side.
        """
        if subspace.rank != 1:
            raise RankError(
                f"A half-space has one direction, but the subspace has rank {subspace.rank}. Choose one of its rows."
            )
        if side not in (1, -1):
            raise ConfigError(f"side={side} was asked for. Give 1 for positive coordinates, or -1.")
        normal = side * subspace.readers[0]
        bias = -float(normal.cpu().double() @ subspace.origin.cpu().double())
        notes = {**subspace.notes, "side": side, "found": subspace.found}
        return cls(normal, bias, float(margin), subspace.site, subspace.where, notes)

    @property
    def width(self) -> int:
        """Dimension d of the space around it."""
        return self.normal.shape[0]

    @property
    def subspace(self) -> Subspace:
        """The one direction in which states are moved; its scale is the length that raises the score by one."""
        return Subspace.span(self._step, site=self.site, where=self.where, notes=self.notes)

    @property
    def parts(self) -> "Sequence[HalfSpace]":
        """What belongs to a model."""
        return (self,)

    def score(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """`normal . x + bias`, in the wider dtype of the two and at least float32; differentiable."""
        self.require_width(x.shape[-1])
        work = torch.promote_types(torch.promote_types(x.dtype, self.normal.dtype), torch.float32)
        normal = self.normal.to(x.device, work)
        return x.to(work) @ normal + self.bias

    def shortfall(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """How much of the score is missing, `max(0, margin - score)`: a hinge loss, which never saturates."""
        return (self.margin - self.score(x)).clamp(min=0)

    def displacement(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What must be added to each state: `shortfall * step`; exactly zero where nothing is missing."""
        missing = self.shortfall(x)
        return missing[..., None] * self._step.to(missing)

    def flipped(self) -> "HalfSpace":
        """The other side of the threshold, with the same margin: `-normal . x - bias >= margin`."""
        step = None if self.step is None else -self.step
        notes = {**self.notes, "flipped": not self.notes.get("flipped", False)}
        return replace(self, normal=-self.normal, bias=-self.bias, step=step, notes=notes)

    def with_margin(self, margin: float) -> "HalfSpace":
        """The same threshold with another margin."""
        return replace(self, margin=float(margin))

    def with_covariance(self, covariance: Float[Tensor, "d d"]) -> "HalfSpace":
        """The same half-space, entered by the move of least Mahalanobis length: step S w / (w . S w).

        States then move the way they vary anyway, and stay likelier than at the end of the shortest move. Whatever
        varies with the score moves along, so that a covariance within one class may lead into the half-space without
        changing what tells the classes apart for the model; that of all rows together contains this difference.

        Args:
            covariance: of the states; may be singular, and nothing moves outside of its range then. For activations:
                `class_moments(acts.batches(site), width, second=True)`, merged, and shrunk by `oas`.

        Raises:
            ShapeError: another width, or no variance along the normal.
        """
        if covariance.shape != (self.width, self.width):
            raise ShapeError(
                f"A covariance of shape {tuple(covariance.shape)} was given for a half-space of width {self.width}."
            )
        normal, work = self.normal.detach().cpu().double(), covariance.cpu().double()
        across = work @ normal
        spread = float(normal @ across)
        least = 1e-12 * float(normal.square().sum()) * float(work.diagonal().max())
        if not (spread > least and bool(across.isfinite().all())):
            raise ShapeError(
                f"The variance along the normal is {spread:.3g}, so that no way the states vary leads into the "
                "half-space. Shrink the covariance (linalg.shrinkage.oas), or use the shortest move."
            )
        return replace(self, step=(across / spread).to(self.normal), notes={**self.notes, "metric": "covariance"})

    @property
    def _step(self) -> Tensor:
        return self.normal / self.normal.square().sum() if self.step is None else self.step

    @property
    def fingerprint(self) -> str | None:
        """Of the model it was found in, where it is known."""
        return self.notes.get("fingerprint")

    def require_model(self, fingerprint: str) -> None:
        """Check that it was found in this very model.

        Raises:
            StaleStore: another model's fingerprint.
        """
        if self.fingerprint not in (None, fingerprint):
            raise StaleStore(
                f"This half-space was found in {self.notes.get('model', 'another model')} (fingerprint "
                f"{str(self.fingerprint)[:12]}), but is used with a model of fingerprint {fingerprint[:12]}. Find it "
                "again in this model, or use subspace.for_any_model() before HalfSpace.of if that is what you want."
            )

    def require_width(self, width: int, site: Site | None = None) -> None:
        """Check that it fits a site.

        Raises:
            ShapeError: another width.
        """
        if width != self.width:
            place = "" if site is None else f" at {site.short}"
            raise ShapeError(
                f"A half-space of width {self.width} was used{place}, where the activations have width {width}. It was "
                "found in another model or at another kind of site; find it again there."
            )

    def __repr__(self) -> str:
        place = "" if self.site is None else f" at {self.site.short}"
        place += "" if self.where is None else f", {self.where}"
        return f"HalfSpace(score >= {self.margin:g}, width {self.width}{place})"
