"""Subspaces of one site's activations; a direction is a subspace of rank one."""

import html
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from subspace_probe.core.errors import ConfigError, RankError, ShapeError, SiteError, StaleStore, StoreError
from subspace_probe.core.files import atomic
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.linalg import angles, bases, projections

FORMAT = "subspace-probe/subspace/1"


@final
@dataclass(frozen=True, eq=False)
class Subspace:
    """An oriented linear subspace of one site, in activation units.

    Attributes:
        basis: orthonormal rows, shape [k, d]; checked.
        scale: the natural step along each row, shape [k]: for a mean difference, the class gap.
        origin: the point projections are taken from, shape [d].
        site: where it was found.
        where: the tokens it was found at.
        found: False where the finder saw no signal above its null; nothing downstream treats it as a finding silently.
        notes: what found it, with which settings, on which data and model; plain JSON values.
    """

    basis: Float[Tensor, "k d"]
    scale: Float[Tensor, " k"]
    origin: Float[Tensor, " d"]
    site: Site | None = None
    where: Where | None = None
    found: bool = True
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        k, d = self.basis.shape
        if self.scale.shape != (k,) or self.origin.shape != (d,):
            raise ShapeError(
                f"A basis of shape {(k, d)} needs scale ({k},) and origin ({d},), "
                f"found {tuple(self.scale.shape)} and {tuple(self.origin.shape)}."
            )
        if not all(bool(t.isfinite().all()) for t in (self.basis, self.scale, self.origin)):
            raise ShapeError("A subspace holds non-finite values. Look for overflow in the activations it came from.")
        error = (self.basis.double() @ self.basis.double().T - torch.eye(k).double().to(self.basis.device)).abs().max()
        if float(error) > 1e-3:
            raise ShapeError(
                f"The rows of the basis are not orthonormal (largest deviation {float(error):.2g}). "
                "Use Subspace.span(vectors), which orthonormalises."
            )

    @classmethod
    def span(
        cls,
        vectors: Float[Tensor, "*k d"],
        *,
        origin: Float[Tensor, " d"] | None = None,
        site: Site | None = None,
        where: Where | None = None,
        found: bool = True,
        notes: dict[str, Any] | None = None,
    ) -> "Subspace":
        """The span of the given vectors; each row's scale is the length of its vector, its sign the vector's.

        Raises:
            RankError: dependent or zero vectors.
        """
        rows = vectors.reshape(-1, vectors.shape[-1]).double()
        try:
            basis = bases.orthonormalise(rows)
        except ValueError as error:
            raise RankError(f"These vectors span no subspace of their number: {error}") from None
        origin = torch.zeros(rows.shape[1]) if origin is None else origin
        return cls(
            basis=basis.float(),
            scale=rows.square().sum(dim=1).sqrt().float(),
            origin=origin.float(),
            site=site,
            where=where,
            found=found,
            notes=dict(notes or {}),
        )

    @property
    def rank(self) -> int:
        """Dimension k of the subspace."""
        return self.basis.shape[0]

    @property
    def width(self) -> int:
        """Dimension d of the space around it."""
        return self.basis.shape[1]

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The direction with its natural length, shape [d].

        Raises:
            RankError: more than one dimension.
        """
        self._require_direction()
        return self.basis[0] * self.scale[0]

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The direction with length one, shape [d]. Rank one only."""
        self._require_direction()
        return self.basis[0]

    def coords(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Coordinates about the origin, in activation units."""
        self.require_width(x.shape[-1])
        return projections.coords(x - self.origin.to(x), self.basis.to(x))

    def project(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The component inside, taken about the origin."""
        return projections.project(x, self.basis.to(x), self.origin.to(x))

    def reject(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """`x` with its component inside replaced by the origin's."""
        return projections.reject(x, self.basis.to(x), self.origin.to(x))

    def overlap(self, other: "Subspace") -> float:
        """Mean squared cosine of the principal angles, 0 to 1."""
        self.require_width(other.width)
        return angles.overlap(self.basis.double(), other.basis.double())

    def cosine(self, other: "Subspace") -> float:
        """Signed cosine between two directions."""
        self.require_width(other.width)
        return angles.cosine(self.vector.double(), other.vector.double())

    def scaled(self, factor: float) -> "Subspace":
        """The same subspace with another natural step; a negative factor turns every row around."""
        basis = -self.basis if factor < 0 else self.basis
        return replace(self, basis=basis, scale=self.scale * abs(factor))

    def moved(self, site: Site) -> "Subspace":
        """The same vectors, said to live at another site."""
        return replace(self, site=site)

    def _require_direction(self) -> None:
        if self.rank != 1:
            raise RankError(f"A direction was asked for, but the subspace has rank {self.rank}. Use basis and scale.")

    def require_width(self, width: int) -> None:
        """Check that it fits a site.

        Raises:
            ShapeError: another width.
        """
        if width != self.width:
            raise ShapeError(
                f"A subspace of width {self.width} was used where the activations have width {width}. "
                "It was found in another model or at another kind of site; find it again there."
            )

    def require_model(self, fingerprint: str) -> None:
        """Check that it was found in this very model.

        Raises:
            StaleStore: another model's fingerprint.
        """
        own = self.notes.get("fingerprint")
        if own is not None and own != fingerprint:
            raise StaleStore(
                f"This subspace was found in {self.notes.get('model', 'another model')} (fingerprint {str(own)[:12]}), "
                f"but is used with a model of fingerprint {fingerprint[:12]}. Find it again in this model, or use "
                "subspace.for_any_model() (--allow-model-mismatch) if that is what you want."
            )

    def for_any_model(self) -> "Subspace":
        """The same subspace, no longer tied to the model it was found in; where it came from stays on record."""
        notes = {name: value for name, value in self.notes.items() if name != "fingerprint"}
        return replace(self, notes={**notes, "found_in": self.notes.get("fingerprint")})

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors with a JSON header; whole or not at all.

        Raises:
            StoreError: the place cannot be written.
        """
        header = {
            "format": FORMAT,
            "site": None if self.site is None else str(self.site),
            "head": None if self.site is None else self.site.head,
            "where": None if self.where is None else str(self.where),
            "found": self.found,
            "notes": self.notes,
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("basis", "scale", "origin")}
        with atomic(Path(path)) as partial:
            save_file(tensors, partial, metadata={"subspace_probe": json.dumps(header, sort_keys=True)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Subspace":
        """Read what `save` wrote.

        Raises:
            StoreError: no such file, or not a subspace file.
        """
        tensors: dict[str, Tensor] = {}
        opened: Any = safe_open  # untyped in safetensors
        try:
            with opened(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                header: Any = json.loads(metadata.get("subspace_probe", "{}"))
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    tensors[name] = file.get_tensor(name)
        except FileNotFoundError:
            raise StoreError(f"No file {str(path)!r}. Make one with Subspace.save or 'subspace-probe find'.") from None
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise StoreError(f"{str(path)!r} is not a readable safetensors file: {error}") from None
        written = cast("dict[str, Any]", header).get("format") if isinstance(header, dict) else "none"
        if written != FORMAT or not {"basis", "scale", "origin"} <= tensors.keys():
            found = f"format {written!r}, tensors {sorted(tensors)}"
            raise StoreError(f"{str(path)!r} is not a subspace of this package: expected {FORMAT!r}, found {found}.")
        kept = cast("dict[str, Any]", header)
        try:
            return cls(
                basis=tensors["basis"],
                scale=tensors["scale"],
                origin=tensors["origin"],
                site=None if kept["site"] is None else replace(Site.parse(kept["site"]), head=kept["head"]),
                where=None if kept["where"] is None else Where.parse(kept["where"]),
                found=kept["found"],
                notes=kept["notes"],
            )
        except (SiteError, ConfigError, ShapeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{str(path)!r} is damaged: {error} Find the subspace again.") from None

    def _repr_html_(self) -> str:
        rows = {"rank": self.rank, "width": self.width, "site": self.site and self.site.short, "where": self.where}
        rows |= {"scale": ", ".join(f"{s:.3g}" for s in map(float, self.scale[:5])), "found": self.found} | self.notes
        cells = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items()
        )
        return f"<b>Subspace</b><table>{cells}</table>"

    def __repr__(self) -> str:
        place = "" if self.site is None else f" at {self.site.short}"
        place += "" if self.where is None else f", {self.where}"
        return f"Subspace(rank {self.rank} of {self.width}{place}{'' if self.found else ', not found'})"
