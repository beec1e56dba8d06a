"""One fit of one finder: rows as they stream by, and what every result says about where it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.protocols import Finder
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import ACTIVATION, Subspace


@final
class Fitting:
    """The rows of one site on their way into a finder.

    Args:
        finder: its name and settings go into the result.
        acts: activations, in memory or on disk.
        site: which of its sites.

    Attributes:
        width: width d of the site.

    Raises:
        SiteError: a site that was not captured.
        DataError: no rows.
        ConfigError: a number of null draws that is none.
    """

    def __init__(self, finder: Finder, acts: Activations, site: Site) -> None:
        self.finder, self.acts, self.site = finder, acts, site
        self._norms, self._rows = 0.0, 0
        self.width = acts.width(site)
        if acts.rows.n == 0:
            raise DataError(f"{finder.name} was given no rows. Capture some prompts.")
        draws = getattr(finder, "null_draws", 0)
        if not isinstance(draws, int) or draws < 0:
            raise ConfigError(f"{finder.name} was given null_draws={draws!r}. It is a whole number, 0 for no test.")

    def batches(self) -> Iterator[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]]:
        """Rows and labels, a block at a time; the norm of the rows is taken on the way.

        Raises:
            ShapeError: non-finite activations, with the rows.
            SiteError: a site that was not captured.
        """
        for block, labels in self.acts.batches(self.site):
            self._norms += float(block.float().norm(dim=1).double().sum())
            self._rows += len(block)
            yield block, labels

    def require_classes(self, least: int = 1) -> None:
        """Check that both classes have rows enough.

        Raises:
            DataError: says how many there are and how many it takes.
        """
        counts = torch.bincount(self.acts.labels, minlength=2)[:2].tolist()
        for label, count in zip((1, 0), reversed(counts), strict=True):
            if count < least:
                have = "no rows" if count == 0 else f"{count} rows"
                raise DataError(
                    f"{self.finder.name} was given {have} of label {label} among {sum(counts)} and needs at least "
                    f"{least} of each class. Add prompts."
                )

    def result(
        self,
        basis: Float[Tensor, "k d"],
        scale: Float[Tensor, " k"],
        origin: Float[Tensor, " d"],
        *,
        found: bool,
        orientation: str,
        reader: Float[Tensor, "k d"] | None = None,
        scale_unit: str = ACTIVATION,
        notes: Mapping[str, Any] | None = None,
    ) -> Subspace:
        """The subspace, with its provenance.

        Args:
            orientation: in words, what a positive coordinate means.
            notes: what this finder alone has to say; plain JSON values.
        """
        return Subspace(
            basis=basis.float(),
            scale=scale.float(),
            origin=origin.float(),
            site=self.site,
            where=self.acts.where,
            found=found,
            reader=None if reader is None else reader.float(),
            scale_unit=scale_unit,
            notes={
                "finder": self.finder.name,
                "settings": _settings(self.finder),
                "orientation": orientation,
                "n": self.acts.rows.n,
                "residual_norm": self._norms / max(self._rows, 1),
                **self.acts.notes,
                # JSON knows no nan: what was not computed is null
                **{name: None if value != value else value for name, value in (notes or {}).items()},
            },
        )


def _settings(finder: object) -> dict[str, Any]:
    """The fields of a finder as JSON values; what has none is named."""
    if not is_dataclass(finder) or isinstance(finder, type):
        return {}
    return {field.name: _plain(getattr(finder, field.name)) for field in fields(finder)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return str(value)
