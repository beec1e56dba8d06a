"""Subspaces of one site's activations; a direction is a subspace of rank one."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from subspace_probe.core.errors import (
    ConfigError,
    PositionError,
    RankError,
    ShapeError,
    SiteError,
    StaleStore,
    StoreError,
)
from subspace_probe.core.files import atomic
from subspace_probe.core.plain import plain
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.linalg import angles, bases, projections

FORMAT = "subspace-probe/subspace/2"
_HEADER: dict[str, Any] = {
    "site": str | None,
    "head": int | None,
    "where": str | None,
    "found": bool,
    "scale_unit": str,
    "notes": dict,
}
"""What each entry of a file's header is."""
ACTIVATION = "activation"
"""The unit of most scales: a step along the basis as long as a difference between states."""


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
        reader: rows that read the coordinates where those are not the basis itself, shape [k, d]: an oblique
            projector, as in LEACE. `reader @ basis.T` is the identity; checked.
        scale_unit: what `scale` is measured in: "activation", or what else the finder measures ("weight", "gradient").
    """

    basis: Float[Tensor, "k d"]
    scale: Float[Tensor, " k"]
    origin: Float[Tensor, " d"]
    site: Site | None = None
    where: Where | None = None
    found: bool = True
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    reader: Float[Tensor, "k d"] | None = None
    scale_unit: str = ACTIVATION

    def __post_init__(self) -> None:
        k, d = self.basis.shape
        if self.scale.shape != (k,) or self.origin.shape != (d,):
            raise ShapeError(
                f"A basis of shape {(k, d)} needs scale ({k},) and origin ({d},), "
                f"found {tuple(self.scale.shape)} and {tuple(self.origin.shape)}."
            )
        tensors = (self.basis, self.scale, self.origin, self.readers)
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise ShapeError("A subspace holds non-finite values. Look for overflow in the activations it came from.")
        error = bases.off_identity(self.basis, self.basis)
        if error > 1e-3:
            raise ShapeError(
                f"The rows of the basis are not orthonormal (largest deviation {error:.2g}). "
                "Use Subspace.span(vectors), which orthonormalises."
            )
        if self.readers.shape != (k, d) or (error := bases.off_identity(self.readers, self.basis)) > 1e-3:
            raise ShapeError(
                f"The reader of a subspace of shape {(k, d)} has shape {tuple(self.readers.shape)} and does not read "
                f"its coordinates (reader @ basis.T is {error:.2g} off the identity). Solve for one, or leave it out."
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
        scale_unit: str = ACTIVATION,
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
            scale_unit=scale_unit,
        )

    @property
    def readers(self) -> Float[Tensor, "k d"]:
        """What reads the coordinates: the basis, unless a reader of its own was given."""
        return self.basis if self.reader is None else self.reader

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
        return projections.coords(x - self.origin.to(x), self.readers.to(x))

    def project(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The component inside, taken about the origin; oblique where there is a reader."""
        return projections.lift(self.coords(x), self.basis.to(x))

    def reject(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """`x` with its component inside replaced by the origin's."""
        return x - self.project(x)

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
        turn = -1.0 if factor < 0 else 1.0
        reader = None if self.reader is None else self.reader * turn
        return replace(self, basis=self.basis * turn, scale=self.scale * abs(factor), reader=reader)

    def __neg__(self) -> "Subspace":
        return self.scaled(-1.0)

    def __mul__(self, factor: float) -> "Subspace":
        return self.scaled(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Subspace":
        return self.scaled(1 / divisor)

    def __add__(self, other: object) -> "Subspace":
        """The sum of two directions with their lengths; both of one site, model and unit."""
        return self._sum(other, 1.0) if isinstance(other, Subspace) else NotImplemented

    def __radd__(self, other: object) -> "Subspace":
        return self if other == 0 else NotImplemented  # sum() begins with 0

    def __sub__(self, other: object) -> "Subspace":
        return self._sum(other, -1.0) if isinstance(other, Subspace) else NotImplemented

    def _sum(self, other: "Subspace", sign: float) -> "Subspace":
        for name, a, b in (
            ("units", self.scale_unit, other.scale_unit),
            ("sites", self.site, other.site),
            ("models", self.notes.get("fingerprint"), other.notes.get("fingerprint")),
        ):
            if a != b and None not in (a, b):
                raise ConfigError(
                    f"Directions of different {name} cannot be added: {a} and {b}. Bring them to the same one first "
                    "(moved, with_scale, for_any_model), if that is what you mean."
                )
        self.require_width(other.width)
        for part in (self, other):
            part.require_projection("added")
        vector = self.vector.double() + sign * other.vector.double().to(self.vector.device)
        if float(vector.square().sum().sqrt()) <= 1e-6 * float(self.scale[0]):
            raise RankError("The directions cancel: nothing is left of their sum, and nothing has no direction.")
        parts = [{"sign": s, **p.notes} for s, p in ((1.0, self), (sign, other))]
        shared = {k: v for k, v in self.notes.items() if other.notes.get(k) == v or k in ("model", "fingerprint")}
        return Subspace.span(
            vector,
            origin=(self.origin + other.origin.to(self.origin)) / 2,
            site=self.site or other.site,
            where=self.where if self.where == other.where else None,
            found=self.found and other.found,
            notes={**shared, "finder": "sum", "parts": parts},
            scale_unit=self.scale_unit,
        )

    def with_scale(self, scale: Float[Tensor, " k"] | Sequence[float], *, unit: str = ACTIVATION) -> "Subspace":
        """The same subspace with the given natural steps, one a row, all positive."""
        steps = torch.as_tensor(scale, dtype=self.scale.dtype)
        if not bool((steps > 0).all()):
            raise ConfigError("Steps that are not positive were given. To turn every row around write -subspace.")
        return replace(self, scale=steps, scale_unit=unit)

    def split(self, by: "Subspace") -> "tuple[Subspace | None, Subspace | None]":
        """The parts of this direction inside and outside of another subspace; None for one that is empty.

        Their vectors add up to this one's. Rank one only: in higher ranks the two parts depend on the basis.
        """
        self.require_width(by.width)
        self.require_projection("split")
        vector = self.vector.double()
        inside = projections.project(vector, by.basis.to(vector))
        return self._part(inside, "inside"), self._part(vector - inside, "outside")

    def _part(self, vector: Tensor, name: str) -> "Subspace | None":
        length = vector.square().sum().sqrt()
        if float(length) <= 1e-6 * float(self.scale[0]):
            return None
        basis, scale = (vector / length)[None].to(self.basis.dtype), length[None].to(self.scale.dtype)
        return replace(self, basis=basis, scale=scale, notes={**self.notes, "part": name})

    def require_projection(self, asked: str) -> None:
        """Check that it is an ordinary, orthogonal one.

        Raises:
            ConfigError: a subspace with a reader of its own.
        """
        if self.reader is not None:
            raise ConfigError(
                f"A subspace with a reader of its own cannot be {asked}: what it writes is not what it reads. "
                "Use dataclasses.replace(subspace, reader=None) for the directions it writes."
            )

    def moved(self, site: Site) -> "Subspace":
        """The same vectors, said to live at another site."""
        return replace(self, site=site)

    def _require_direction(self) -> None:
        if self.rank != 1:
            raise RankError(f"A direction was asked for, but the subspace has rank {self.rank}. Use basis and scale.")

    def require_width(self, width: int, site: Site | None = None) -> None:
        """Check that it fits a site.

        Raises:
            ShapeError: another width.
        """
        if width != self.width:
            raise ShapeError(
                f"A subspace of width {self.width} was used where the activations have width {width}. "
                "It was found in another model or at another kind of site; find it again there."
            )

    @property
    def fingerprint(self) -> str | None:
        """Of the model it was found in, where that is known and matters."""
        return self.notes.get("fingerprint")

    def require_model(self, fingerprint: str) -> None:
        """Check that it was found in this very model.

        Raises:
            StaleStore: another model's fingerprint.
        """
        own = self.fingerprint
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
            "scale_unit": self.scale_unit,
            "notes": plain(self.notes),
        }
        kept = {"basis": self.basis, "scale": self.scale, "origin": self.origin, "reader": self.reader}
        # copies: a view would be written with all that lies behind it
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in kept.items() if value is not None}
        with atomic(Path(path)) as partial:
            save_file(
                tensors, partial, metadata={"subspace_probe": json.dumps(header, sort_keys=True, allow_nan=False)}
            )
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
        wrong = [name for name, kind in _HEADER.items() if not isinstance(kept.get(name), kind)]
        wrong += [name for name, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.numel()]
        if wrong or bool((tensors["scale"] < 0).any()):
            named = ", ".join(wrong) or "scale, which is negative"
            raise StoreError(f"{str(path)!r} is damaged: unfit {named}. Find the subspace again.")
        try:
            return cls(
                basis=tensors["basis"],
                scale=tensors["scale"],
                origin=tensors["origin"],
                site=None if kept["site"] is None else replace(Site.parse(kept["site"]), head=kept["head"]),
                where=None if kept["where"] is None else Where.parse(kept["where"]),
                found=kept["found"],
                notes=kept["notes"],
                reader=tensors.get("reader"),
                scale_unit=kept["scale_unit"],
            )
        except (SiteError, ConfigError, ShapeError, PositionError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{str(path)!r} is damaged: {error} Find the subspace again.") from None

    def _repr_html_(self) -> str:
        rows = {"rank": self.rank, "width": self.width, "site": self.site and self.site.short, "where": self.where}
        rows |= {"scale": ", ".join(f"{s:.3g}" for s in map(float, self.scale[:5])), "scale_unit": self.scale_unit}
        rows |= {"found": self.found} | self.notes
        cells = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items()
        )
        return f"<b>Subspace</b><table>{cells}</table>"

    def __repr__(self) -> str:
        place = "" if self.site is None else f" at {self.site.short}"
        place += "" if self.where is None else f", {self.where}"
        return f"Subspace(rank {self.rank} of {self.width}{place}{'' if self.found else ', not found'})"
