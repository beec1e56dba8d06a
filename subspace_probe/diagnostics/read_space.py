"""The part of a site's space that something behind it reads."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.linalg.illusions import RowSpace, Split, row_space, split_by_row_space
from subspace_probe.models.backend import Backend
from subspace_probe.models.reading import readers

ENERGY = 0.99
"""Of the gradients, which are as many as there are prompts, this much is read; the rest is noise."""


@final
@dataclass(frozen=True, eq=False)
class ReadSpace:
    """What is visible to what comes behind a site.

    Attributes:
        of: what reads, in words.
        rows: the directions that are read; what is orthogonal to them is invisible.
        exact: whether the rest is provably invisible, as it is to a linear map, or only to the metric's gradients.
    """

    of: str
    rows: RowSpace
    exact: bool

    @property
    def basis(self) -> Float[Tensor, "r d"]:
        """Orthonormal rows."""
        return self.rows.basis.float()

    @property
    def rank(self) -> int:
        """Number of visible dimensions."""
        return self.rows.rank

    def split(self, subspace: Subspace) -> Split:
        """The visible and the invisible part of a subspace, each orthonormal."""
        return split_by_row_space(subspace.basis.double().cpu(), self.rows.basis)

    def __str__(self) -> str:
        kind = "all else is invisible to it" if self.exact else f"{ENERGY:.0%} of their energy"
        width, effective = self.rows.basis.shape[1], self.rows.effective_rank
        return f"{self.of}: rank {self.rank} of {width}, effective rank {effective:.0f}; {kind}"


def weight_read_space(backend: Backend, site: Site) -> ReadSpace:
    """Of the matrix that reads `mlp_post` or `z`, by its singular values.

    Raises:
        UnsupportedSite: nothing that could be named reads it.
        BackendError: quantised weights, or adapters that are not merged.
    """
    matrices = readers(backend, site)
    rows = torch.cat([block for matrix in matrices for block in matrix.vectors()])
    return ReadSpace(", ".join(matrix.name for matrix in matrices), row_space(rows), exact=True)


def path_read_space(gradients: Float[Tensor, "n d"]) -> ReadSpace:
    """Of the metric, from gradients between bases and sources, each of length one: so much that holds 99 %."""
    lengths = gradients.double().norm(dim=1, keepdim=True)
    rows = gradients.double()[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    of = f"{len(rows)} gradients of the metric between base and source"
    if not len(rows):
        return ReadSpace(f"{of}, all others zero", RowSpace(rows, rows.new_zeros(0)), False)
    space = row_space(rows)
    energy = space.singular_values.square().cumsum(0) / space.singular_values.square().sum()
    kept = min(space.rank, int((energy < ENERGY).sum()) + 1)
    return ReadSpace(of, RowSpace(space.basis[:kept], space.singular_values[:kept]), False)
