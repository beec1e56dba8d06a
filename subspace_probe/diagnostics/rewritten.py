"""An intervention with its edits replaced: what a check runs in its place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from subspace_probe.core.edits import EditMap
from subspace_probe.core.protocols import Intervention, Part
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where


@final
@dataclass(frozen=True, eq=False)
class Rewritten:
    """All as in an intervention, but for its edits.

    Args:
        of: the intervention, all parts of which must fit the model still.
        rewrite: from its edits to those that are made instead.
    """

    of: Intervention
    rewrite: Callable[[EditMap], EditMap]

    @property
    def subspace(self) -> Subspace | None:
        """That of the intervention."""
        return self.of.subspace

    @property
    def where(self) -> Where:
        """The same tokens."""
        return self.of.where

    def edits(self, n_layers: int) -> EditMap:
        """Those that are made instead."""
        return self.rewrite(self.of.edits(n_layers))

    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]:
        """Of the whole intervention."""
        return self.of.parts(n_layers)

    def with_subspace(self, subspace: Subspace) -> "Rewritten":
        """The same with another subspace."""
        return replace(self, of=self.of.with_subspace(subspace))
