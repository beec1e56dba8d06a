"""Edits of rank one of the matrix that an MLP writes with, one a prompt, at run time: the weights stay as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.edits import EditContext, EditMap, Needs
from subspace_probe.core.protocols import Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import PROMPT, Where


@final
@dataclass(frozen=True, eq=False)
class WeightEdit:
    """mlp_out + write (read . mlp_post) at every token of the prompt: W + write read^T in the place of W.

    The form of Meng et al. 2022, arXiv:2202.05262, eq. 2; see `linalg.rank_one_edits` for the edit that stands for a
    patch. Prompt i is run with row i, so that many facts are edited in one pass, each for itself. Not for families that
    norm an MLP's output before it is added.

    Args:
        layer: of the MLP.
        write: what is written, shape [n, d_model].
        read: what it is multiplied with, shape [n, d_mlp].
    """

    layer: int
    write: Float[Tensor, "n d_model"]
    read: Float[Tensor, "n d_mlp"]

    @property
    def subspace(self) -> Subspace | None:
        """None: it acts on a weight."""
        return None

    @property
    def where(self) -> Where:
        """Every token of the prompt."""
        return PROMPT

    def edits(self, n_layers: int) -> EditMap:
        """One edit at mlp_out."""
        layer = Site(self.layer).resolve(n_layers).layer
        return {Site(layer, "mlp_out"): _Written(self, Site(layer, "mlp_post"))}

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """None that belong to another model."""
        return []

    def with_subspace(self, subspace: Subspace) -> "WeightEdit":
        """Itself: there is no subspace to exchange."""
        return self


@final
@dataclass(frozen=True, eq=False)
class _Written:
    of: WeightEdit
    site: Site

    @property
    def needs(self) -> Needs:
        return frozenset({(self.site, PROMPT)})

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        index = ctx.batch.index.cpu()
        # in float32 at least, and rounded once
        wide = torch.promote_types(x.dtype, torch.float32)
        read, write = (rows[index].to(x.device, wide) for rows in (self.of.read, self.of.write))
        amount = (ctx.reads[self.site].to(wide) * read[:, None]).sum(-1, keepdim=True) * ctx.select(PROMPT)[..., None]
        return (x.to(wide) + amount * write[:, None]).to(x.dtype)
