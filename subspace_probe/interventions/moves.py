"""Moves from one subspace to another, fitted on states of two classes: with partners, or on their moments alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError, RankError, ShapeError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.linalg import bases, projections
from subspace_probe.linalg.moments import Moments, class_moments
from subspace_probe.linalg.shrinkage import oas, shrunk
from subspace_probe.linalg.transport import gaussian_map, procrustes


@final
@dataclass(frozen=True, eq=False)
class Move:
    """From one subspace to another: take the component in `source` out, then set the one in `target`.

        z = A (x - a)      r = x - A^T z      x' = r + B^T (M z + B (b - r))

    with A and B the bases (rows), a and b the origins. About b, the coordinates in the target become M z, exactly,
    whatever the angle between the two spans: a component that the state had there before is replaced, and whatever
    lies outside of both spans stays. With one subspace for both, one origin and M the identity, nothing moves.

    Attributes:
        source: what is read and taken out; its origin is the mean of the states that are moved.
        target: of the same rank; its origin is the mean of the states they are to look like.
        matrix: M, shape [k, k].
        notes: how it was fitted; plain JSON values.
    """

    source: Subspace
    target: Subspace
    matrix: Float[Tensor, "k k"]
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.target.require_width(self.source.width)
        for end in (self.source, self.target):
            end.require_projection("moved from or to")
        if self.source.rank != self.target.rank or len(self.matrix) != self.source.rank:
            raise RankError(
                f"States cannot be moved from rank {self.source.rank} to rank {self.target.rank} by a matrix of shape "
                f"{tuple(self.matrix.shape)}. Give two subspaces of one rank k, and a matrix [k, k]."
            )
        if not bool(self.matrix.isfinite().all()):
            raise ShapeError("The matrix of a move is not finite. Look for overflow in the states it came from.")

    @classmethod
    def paired(
        cls, acts: Activations, site: Site, source: Subspace, target: Subspace | None = None, *, label: int = 0
    ) -> "Move":
        """The rotation that carries each state's coordinates nearest to its partner's (orthogonal Procrustes).

        The notes say how well: the correlation of the rotated coordinates with the partners', 0 to 1.

        Args:
            acts: minimal pairs with one row of each label; rows without a partner are left out.
            site: which of the captured sites.
            source: what is read of the states that are moved.
            target: where they go; the source itself by default.
            label: the states that are moved have this one, those they are moved to the other.

        Raises:
            DataError: no complete pair, several rows of one label in a pair, or pairs that determine no rotation.
            RankError: subspaces of two ranks.
            StaleStore: a subspace of another model than the activations.
        """
        ends = _ends(acts, site, source, target)
        rows = _partners(acts, label)
        means, coords = _read(acts, site, ends, rows)
        z, y = (c - c.mean(0) for c in coords)
        try:
            rotation = procrustes(z, y)
        except ValueError as error:
            raise DataError(f"No rotation between the pairs at {site.short}: {error}") from None
        fit = float((z @ rotation.T * y).sum() / (z.square().sum() * y.square().sum()).sqrt())
        notes = {**acts.notes, "move": "procrustes", "label": label, "pairs": len(rows[0]), "correlation": fit}
        return cls(_about(ends[0], means[0]), _about(ends[1], means[1]), rotation.float(), notes)

    @classmethod
    def transport(
        cls,
        acts: Activations,
        site: Site,
        source: Subspace | None = None,
        target: Subspace | None = None,
        *,
        label: int = 0,
        shrinkage: float | Literal["oas"] = "oas",
    ) -> "Move":
        """Without partners: mean and covariance of one class are carried onto the other's. See `of_moments`.

        Costs one pass over the rows, in memory or on disk, and a matrix [d, d] for each class.

        Args:
            acts: rows of both labels.
            site: which of the captured sites.
            source: move within it alone; by default whole states.
            target: where they go; the source itself by default.
            label: the states that are moved have this one, those they are moved to the other.
            shrinkage: of both covariances.

        Raises:
            DataError: fewer than two rows of a label.
            ConfigError: a covariance that no map can start from, or shrinkage outside [0, 1].
            StaleStore: a subspace of another model than the activations.
        """
        seen = class_moments(acts.batches(site), acts.width(site), second=True)
        counts = {value: seen[value].n if value in seen else 0 for value in (label, 1 - label)}
        if min(counts.values()) < 2:
            raise DataError(f"A covariance needs two rows of each label, but there are {counts}. Add prompts.")
        ends = _ends(acts, site, source or _whole(acts.width(site)), target)
        move = cls.of_moments(seen[label], seen[1 - label], *ends, shrinkage=shrinkage)
        return replace(move, notes={**acts.notes, **move.notes, "label": label})

    @classmethod
    def of_moments(
        cls,
        start: Moments,
        end: Moments,
        source: Subspace | None = None,
        target: Subspace | None = None,
        *,
        shrinkage: float | Literal["oas"] = "oas",
    ) -> "Move":
        """The optimal map between Gaussians with these moments, in coordinates of the subspaces.

        M = S^-1/2 (S^1/2 C S^1/2)^1/2 S^-1/2: of all maps that turn the covariance S of the coordinates into C, the
        one that changes them least (Knott & Smith 1984). With two different subspaces, row i of the one stands for
        row i of the other: which coordinate belongs to which is nothing that states without partners can tell.

        Args:
            start: of the states that are moved, with scatter.
            end: of the states they are moved to, with scatter.
            source: None moves whole states.
            target: the source itself by default.
            shrinkage: of both covariances. With 0 the moved rows have the target's moments exactly, which takes
                more rows than coordinates; otherwise the shrunk covariances are matched.

        Raises:
            ConfigError: a singular covariance at the start, or shrinkage outside [0, 1].
            RankError: subspaces of two ranks.
        """
        source = source or _whole(len(start.mean))
        target = target or source
        _same_rank(source, target)
        try:
            matrix = gaussian_map(_covariance(source, start, shrinkage), _covariance(target, end, shrinkage))
        except ValueError as error:
            raise ConfigError(f"No transport between these states with shrinkage={shrinkage}: {error}") from None
        notes = {"move": "gaussian transport", "shrinkage": shrinkage, "rows": [start.n, end.n]}
        return cls(_about(source, start.mean), _about(target, end.mean), matrix.float(), notes)

    @property
    def site(self) -> Site | None:
        """Where it was fitted."""
        return self.source.site

    @property
    def where(self) -> Where | None:
        """The tokens it was fitted at."""
        return self.source.where

    @property
    def subspace(self) -> Subspace:
        """Where states are ever moved: the span of source and target together."""
        inside = self.source.basis.double()
        outside = projections.reject(self.target.basis.double(), inside)
        if float(outside.square().sum(1).max()) > 1e-8:  # a rotation of the source's own rows is no further direction
            _, values, axes = torch.linalg.svd(outside, full_matrices=False)
            inside = bases.orthonormalise(torch.cat([inside, axes[values > 1e-4]]))
        basis = inside.to(self.source.basis)
        return replace(self.source, basis=basis, scale=torch.ones(len(basis)).to(basis), notes=self.notes)

    @property
    def parts(self) -> Sequence[Subspace]:
        """What belongs to a model."""
        return self.source, self.target

    def displacement(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What must be added to each state, in its dtype and at least float32; differentiable."""
        work = torch.promote_types(torch.promote_types(x.dtype, self.matrix.dtype), torch.float32)
        a, b, start, end, matrix = (
            t.to(x.device, work)
            for t in (self.source.basis, self.target.basis, self.source.origin, self.target.origin, self.matrix)
        )
        z = (x.to(work) - start) @ a.T
        out = z @ a
        missing = z @ matrix.T + (end - x.to(work) + out) @ b.T
        return missing @ b - out

    def __repr__(self) -> str:
        there = "itself" if self.target.basis is self.source.basis else repr(self.target)
        return f"Move({self.notes.get('move', 'stated')}, from {self.source!r} to {there})"


def _whole(width: int) -> Subspace:
    return Subspace(torch.eye(width), torch.ones(width), torch.zeros(width), notes={"span": "all"})


def _same_rank(source: Subspace, target: Subspace) -> None:
    if source.rank != target.rank:
        raise RankError(
            f"States were to be moved from rank {source.rank} to rank {target.rank}. Give subspaces of one rank."
        )


def _about(subspace: Subspace, mean: Tensor) -> Subspace:
    return replace(subspace, origin=mean.to(subspace.basis))


def _ends(acts: Activations, site: Site, source: Subspace, target: Subspace | None) -> tuple[Subspace, Subspace]:
    """Both subspaces at the site and tokens of the activations, and of their model."""
    ends = (source, target or source)
    _same_rank(*ends)
    fingerprint = acts.notes.get("fingerprint")
    known = {name: acts.notes[name] for name in ("model", "fingerprint") if name in acts.notes}
    for end in ends:
        end.require_width(acts.width(site), site)
        if fingerprint is not None:
            end.require_model(fingerprint)
    first, second = (replace(end, site=site, where=acts.where, notes={**end.notes, **known}) for end in ends)
    return first, second


def _partners(acts: Activations, label: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """The rows of every complete pair: those of the label, and in the same order those of the other."""
    labels, pairs = acts.labels, acts.pairs
    sides = [(labels == value).nonzero().flatten() for value in (label, 1 - label)]
    mine, theirs = (rows[pairs[rows].argsort()] for rows in sides)
    one, other = mine[torch.isin(pairs[mine], pairs[theirs])], theirs[torch.isin(pairs[theirs], pairs[mine])]
    if len(one) == 0:
        raise DataError(
            "No pair has a row of each label. Give 'pair' numbers to the prompts, or fit a transport, which needs none."
        )
    if not torch.equal(pairs[one], pairs[other]) or len(pairs[one].unique()) < len(one):
        raise DataError(
            "Some pairs have several rows of one label, so no state has one partner. Capture one token of each prompt "
            "(LAST, T_INST), and give pairs of two prompts; or fit a transport, which needs no partners."
        )
    return one, other


def _read(
    acts: Activations, site: Site, ends: tuple[Subspace, Subspace], rows: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """In one pass, for source and target: the mean state of their rows, and the rows' coordinates, in float64."""
    coords = [torch.zeros(acts.rows.n, end.rank, dtype=torch.float64) for end in ends]
    means = [torch.zeros(acts.width(site), dtype=torch.float64) for _ in ends]
    taken = [torch.zeros(acts.rows.n, dtype=torch.float64).index_fill(0, some, 1 / len(some)) for some in rows]
    start = 0
    for block, _ in acts.batches(site):
        states, here = block.double().cpu(), slice(start, start + len(block))
        for i, end in enumerate(ends):
            means[i] += taken[i][here] @ states
            coords[i][here] = projections.coords(states, end.basis.double().cpu())
        start += len(block)
    return means, [all_rows[some] for all_rows, some in zip(coords, rows, strict=True)]


def _covariance(subspace: Subspace, moments: Moments, shrinkage: float | str) -> Tensor:
    """Of the coordinates, shrunk as asked."""
    basis = subspace.basis.double().cpu()
    covariance = basis @ moments.covariance() @ basis.T
    return oas(covariance, moments.n)[0] if isinstance(shrinkage, str) else shrunk(covariance, shrinkage)
