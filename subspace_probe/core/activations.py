"""Activations with their labels: what finders are fitted on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import DataError, ShapeError, SiteError, unknown
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.linalg import heavy
from subspace_probe.linalg.finite import all_finite


@runtime_checkable
class Rows(Protocol):
    """Rows of activations, in memory or on disk."""

    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def n(self) -> int: ...
    def width(self, site: Site) -> int: ...
    def read(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows width"]: ...


@final
@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows held in memory, one tensor [n, width] per site."""

    tensors: Mapping[Site, Tensor]

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was captured, in forward order."""
        return tuple(self.tensors)

    @property
    def n(self) -> int:
        """Number of rows."""
        return next(iter(self.tensors.values())).shape[0]

    def width(self, site: Site) -> int:
        """Width of a site."""
        return self.tensors[site].shape[1]

    def read(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Some rows of a site."""
        return self.tensors[site][start:stop]


@final
@dataclass(frozen=True, eq=False)
class KeptRows:
    """Some of other rows, which stay where they are, on disk or in memory.

    Attributes:
        source: all rows.
        kept: indices of those that are left, ascending, shape [k].
    """

    source: Rows
    kept: Int[Tensor, " k"]

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was captured, in forward order."""
        return self.source.sites

    @property
    def n(self) -> int:
        """Number of rows that are left."""
        return len(self.kept)

    def width(self, site: Site) -> int:
        """Width of a site."""
        return self.source.width(site)

    def read(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Some rows of a site; what lies between the first and the last of them is read as well."""
        kept = self.kept[start:stop]
        if not len(kept):
            return self.source.read(site, 0, 0)
        first = int(kept[0])
        return self.source.read(site, first, int(kept[-1]) + 1)[kept - first]


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of n tokens at some sites, with the labels of the prompts they came from.

    Attributes:
        rows: the activations.
        contrast: the prompts.
        prompt: which prompt each row is from, shape [n]. With a one-token `where`, row i is prompt i.
        position: absolute position of each row's token, shape [n].
        where: which tokens were asked for.
        notes: model, fingerprint, dtype, template; plain JSON values.
    """

    rows: Rows
    contrast: Contrast
    prompt: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    where: Where
    notes: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """1 positive, 0 negative, shape [n]."""
        return torch.tensor(self.contrast.labels)[self.prompt]

    @property
    def pairs(self) -> Int[Tensor, " n"]:
        """Minimal pair of each row, shape [n]."""
        return torch.tensor(self.contrast.pairs)[self.prompt]

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """Group of each row, shape [n]; intervals go by it."""
        return torch.tensor(self.contrast.groups)[self.prompt]

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was captured."""
        return self.rows.sites

    def factor(self, name: str) -> Int[Tensor, " n"]:
        """A further label by name, shape [n].

        Raises:
            UnknownName: no such factor.
        """
        if name not in self.contrast.factors:
            raise unknown("factor", name, self.contrast.factors)
        return torch.tensor(self.contrast.factors[name])[self.prompt]

    def width(self, site: Site) -> int:
        """Width of a site.

        Raises:
            SiteError: a site that was not captured.
        """
        return self.rows.width(self._require(site))

    def at(self, site: Site) -> Float[Tensor, "n d_model"]:
        """All rows of one site, shape [n, width]."""
        return self.rows.read(self._require(site), 0, self.rows.n)

    def batches(self, site: Site, size: int = 4096) -> Iterator[tuple[Float[Tensor, "b d_model"], Int[Tensor, " b"]]]:
        """Rows and labels of one site, a block at a time.

        Raises:
            ShapeError: non-finite activations, with the rows.
        """
        labels = self.labels
        self._require(site)
        for start in range(0, self.rows.n, size):
            block = self.rows.read(site, start, min(start + size, self.rows.n))
            if not all_finite(block):
                bad = (~block.isfinite().all(dim=1)).nonzero().flatten()
                shown = ", ".join(str(start + int(row)) for row in bad[:10])
                raise ShapeError(
                    f"Activations at {site.short} are not finite in {bad.numel()} rows ({shown}). "
                    "Load the model in bfloat16 or float32 if it was float16, or leave these prompts out."
                )
            yield block, labels[start : start + size]

    def take(self, keep: Int[Tensor, " k"]) -> "Activations":
        """Some rows, in memory, with their prompts."""
        return self._kept(MemoryRows({site: self.at(site)[keep] for site in self.sites}), keep)

    def heavy_rows(self, site: Site) -> Int[Tensor, " k"]:
        """Rows so long that each alone could be a component: those with `||a_i||^2 >= ||A||_F^2 / d` about zero.

        First tokens and massive activations usually. They are reported, never dropped silently: look at their
        `prompt` and `position`, then call `without`.

        Raises:
            DataError: no more rows than the site is wide, so that the average row would count.
            ShapeError: non-finite activations, with the rows.
        """
        width = self.width(site)
        if self.rows.n <= width:
            raise DataError(
                f"The heavy rows at {site.short} were asked for, but there are {self.rows.n} rows of width {width}; "
                "with so few the average row counts as heavy. Capture more prompts or more tokens of each."
            )
        return heavy.heavy_rows(block for block, _ in self.batches(site))

    def without(self, rows: Int[Tensor, " k"]) -> "Activations":
        """All rows but these. What lies on disk stays there and is read a block at a time, as before.

        Raises:
            ShapeError: a row that does not exist.
            DataError: nothing is left.
        """
        if rows.dtype == torch.bool:
            raise ShapeError("A mask was given. Give the numbers of the rows to leave out: mask.nonzero().flatten().")
        keep = torch.ones(self.rows.n, dtype=torch.bool)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows.n:
            raise ShapeError(
                f"Rows {int(rows.min())} to {int(rows.max())} were to be left out of {self.rows.n}; rows are counted "
                f"from 0 to {self.rows.n - 1}. Take them from heavy_rows of these same activations."
            )
        keep[rows.cpu()] = False
        if not bool(keep.any()):
            raise DataError(f"All {self.rows.n} rows were to be left out. Leave some in.")
        return self._part(keep.nonzero().flatten())

    def _kept(self, rows: Rows, keep: Tensor) -> "Activations":
        """These rows, which `keep` are, with their prompts."""
        prompts = sorted({int(p) for p in self.prompt[keep]})
        renumber = {old: new for new, old in enumerate(prompts)}
        return replace(
            self,
            rows=rows,
            contrast=self.contrast.take(prompts),
            prompt=torch.tensor([renumber[int(p)] for p in self.prompt[keep]], dtype=torch.long),
            position=self.position[keep],
        )

    def relabel(self, factor: str) -> "Activations":
        """The same rows with a factor as the label."""
        return replace(self, contrast=self.contrast.relabel(factor))

    def with_labels(self, labels: tuple[int, ...]) -> "Activations":
        """The same rows under other labels of their prompts; for permutation nulls."""
        return replace(self, contrast=replace(self.contrast, labels=labels))

    def where_prompts(self, keep: Contrast) -> "Activations":
        """The rows whose prompts are in `keep`, a selection of this one's prompts."""
        known, wanted = {id(prompt) for prompt in self.contrast.prompts}, {id(prompt) for prompt in keep.prompts}
        if wanted <= known:  # equal prompts may stand in a contrast more than once
            rows = [i for i, p in enumerate(map(int, self.prompt)) if id(self.contrast.prompts[p]) in wanted]
        else:  # rows that were read from disk
            rows = [i for i, p in enumerate(map(int, self.prompt)) if self.contrast.prompts[p] in keep.prompts]
        return self.take(torch.tensor(rows, dtype=torch.long))

    def select(self, label: int | None = None, **factors: int) -> "Activations":
        """The rows with the given label and factors."""
        keep = torch.ones(self.rows.n, dtype=torch.bool)
        if label is not None:
            keep &= self.labels == label
        for name, value in factors.items():
            keep &= self.factor(name) == value
        return self.take(keep.nonzero().flatten())

    def split(self, fraction: float, *, seed: int) -> "tuple[Activations, Activations]":
        """Two parts that share no pair and no group; what lies on disk stays there."""
        parts = self.contrast.split_rows(fraction, seed=seed)
        first, second = (torch.isin(self.prompt, torch.tensor(rows)).nonzero().flatten() for rows in parts)
        return self._part(first), self._part(second)

    def only(self, site: Site) -> "Activations":
        """One site alone, its rows in memory."""
        return replace(self, rows=MemoryRows({site: self.at(site)}))

    def _part(self, keep: Tensor) -> "Activations":
        """Some rows in their order: in memory if they were, else where they are."""
        if isinstance(self.rows, MemoryRows):
            return self.take(keep)
        return self._kept(KeptRows(self.rows, keep), keep)

    def _require(self, site: Site) -> Site:
        if site not in self.rows.sites:
            captured = ", ".join(s.short for s in self.rows.sites)
            raise SiteError(f"{site.short} was asked for, but these activations hold {captured}. Capture it first.")
        return site

    def __repr__(self) -> str:
        sites = ", ".join(site.short for site in self.sites)
        return f"Activations({self.rows.n} rows at {self.where} of {self.contrast.name!r}: {sites})"
