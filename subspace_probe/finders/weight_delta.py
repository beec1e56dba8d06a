"""Singular subspaces of what tuning changed in the weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, RankError, ShapeError
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.linalg.permutations import permutation_p
from subspace_probe.models import load_model
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.reading import Matrix, readers, writers

Side = Literal["left", "right", "both"]
Pairs = list[tuple[Matrix, Matrix]]
_SHAPES = ("family", "n_layers", "d_model", "n_heads", "d_head")
_SHOWN = 32


@final
@dataclass(frozen=True, eq=False)
class WeightDelta:
    """The directions of a site that tuning changed the weights along (Ponkshe et al. 2025, arXiv:2505.14185).

    The difference `other - model` is taken in float64 for the matrices that write into the site ("left": their left
    singular vectors, in output space), for those that read it next ("right": right singular vectors, in input space),
    or for all of them stacked ("both": one stream is the output space of the ones and the input space of the others).
    Which matrices these are, and that the gains of norms are multiplied in, is said in `models.reading`.

    The scale of a row is its singular value (unit "weight"). It counts as found when the largest singular value
    exceeds 95 % of those of the same difference with the sign of every entry drawn anew, which keeps the size of every
    entry and undoes what they have in common (Hong, Sheng & Dobriban 2020, arXiv:2012.02985). Weights carry no
    labels: with a contrast, signs point to label 1 and the origin is the midpoint of the class means; without one,
    the largest entry of a row is positive and the origin is zero. The result belongs to the model given to `fit`; base
    and tuned model may change places, which gives the same directions, at home in the tuned one.

    A change of the weights says where tuning acted, not what it is for: see the controls of the study cited.

    Args:
        other: the tuned checkpoint, loaded or as a folder or hub id; the model given to `fit` is the base.
        side: "left", "right" or "both".
        rank: keep so many directions.
        energy: keep the fewest that hold this share of the squared Frobenius norm. With neither, keep those above the
            95 % point of the null's largest singular value, and at least one. The null keeps all of the difference's
            energy, so one very strong direction hides weak ones.
        matrix: use only matrices whose name contains this, such as "q_proj".
        null_draws: draws of signs behind `found`, each as costly as the fit; 0 skips the test, and the rank is then
            judged by the Marchenko-Pastur edge: the largest singular value of as many entries of one variance, which
            rows or channels of uneven size exceed without any structure.
        seed: of the signs.
    """

    name: ClassVar[str] = "weight_delta"
    cost: ClassVar[str] = "no forward passes, O(draws (n d^2 + d^3)) for n rows"
    use: ClassVar[str] = "what fine-tuning changed, from two checkpoints alone"

    other: HookedModel | str
    side: Side = "left"
    rank: int | None = None
    energy: float | None = None
    matrix: str | None = None
    null_draws: int = 19
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side not in ("left", "right", "both"):
            raise ConfigError(f"side={self.side!r} was given. It is 'left' (writers), 'right' (readers) or 'both'.")
        if self.rank is not None and self.energy is not None:
            raise ConfigError(f"Both rank={self.rank} and energy={self.energy} were given. Give one of them.")
        if (self.rank is not None and self.rank < 1) or (self.energy is not None and not 0 < self.energy <= 1):
            raise ConfigError(f"rank={self.rank}, energy={self.energy}: rank starts at 1, energy is a share above 0.")
        if self.null_draws < 0:
            raise ConfigError(f"null_draws={self.null_draws} was given. It is a number of draws, or 0.")

    def fit(
        self, model: HookedModel, contrast: Contrast | None, site: Site, where: Where, *, progress: bool = False
    ) -> Subspace:
        """The singular subspace at a site of the base model.

        Args:
            contrast: orients the rows and sets the origin; None does without prompts.
            where: tokens the contrast is read at, and where the subspace is said to live.

        Raises:
            ConfigError: models of different architectures or vocabularies; no matrix of that name.
            ShapeError: a matrix that has another shape in the other model.
            RankError: a rank above that of the difference.
            UnsupportedSite: a site that no such matrix belongs to.
            BackendError: quantised weights, or adapters that are not merged.
        """
        other = self.other if isinstance(self.other, HookedModel) else load_model(self.other)
        site = site.resolve(model.spec.n_layers)
        pairs = self._pairs(model, other, site)
        values, vectors = torch.linalg.eigh(_gram(_deltas(pairs)))
        singular, basis = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1).T
        empty = float(singular[0]) == 0.0
        bar: Callable[..., Any] = tqdm
        draws = bar(range(0 if empty else self.null_draws), desc="sign flips", disable=not progress, leave=False)
        null = torch.tensor([self._null(pairs, draw) for draw in draws], dtype=torch.float64)
        p = permutation_p(float(singular[0]), null, side="greater") if len(null) else float("nan")
        edge = float(null.quantile(0.95)) if len(null) else _noise_edge(singular, sum(len(a.weight) for a, _ in pairs))
        kept = basis[: 1 if empty else self._rank(singular, edge)]
        signs, origin, orientation = _oriented(kept, model, contrast, site, where)
        return Subspace(
            basis=(kept * signs[:, None]).float(),
            scale=singular[: len(kept)].float(),
            origin=origin.float(),
            site=site,
            where=where,
            found=not (empty or p > 0.05),
            scale_unit="weight",
            notes={
                **self._sources(model, other),
                "orientation": orientation,
                **_described(singular, len(kept)),
                "matrices": {base.name: _norms(base, tuned) for base, tuned in pairs},
                "null_singular_95": edge,
                "p": p if len(null) else None,
                **({"reason": "The two checkpoints are the same in these matrices."} if empty else {}),
            },
        )

    def _sources(self, model: HookedModel, other: HookedModel) -> dict[str, object]:
        fields = ("side", "rank", "energy", "matrix", "null_draws", "seed")
        return {
            "finder": self.name,
            "settings": {"other": other.spec.name, **{name: getattr(self, name) for name in fields}},
            "model": model.spec.name,
            "fingerprint": model.fingerprint,
            "other": other.spec.name,
            "other_fingerprint": other.fingerprint,
        }

    def _pairs(self, model: HookedModel, other: HookedModel, site: Site) -> Pairs:
        """Each matrix of the site in both models."""
        _require_same_kind(model, other)
        sides = [writers] * (self.side != "right") + [readers] * (self.side != "left")
        base, tuned = ([m for find in sides for m in find(each.backend, site)] for each in (model, other))
        if [m.name for m in base] != [m.name for m in tuned]:
            raise ConfigError(
                f"At {site.short} one model has {_names(base)}, the other {_names(tuned)}. Compare equals."
            )
        pairs = [pair for pair in zip(base, tuned, strict=True) if self.matrix is None or self.matrix in pair[0].name]
        if not pairs:
            raise ConfigError(f"No matrix at {site.short} has {self.matrix!r} in its name. There are {_names(base)}.")
        for a, b in pairs:
            if a.weight.shape != b.weight.shape:
                shapes = f"{tuple(a.weight.shape)} and {tuple(b.weight.shape)}"
                raise ShapeError(f"{a.name} has shapes {shapes} in the two models, which cannot be subtracted.")
        last = site.layer + 1 == model.spec.n_layers and site.stream in ("attn_out", "mlp_out", "resid_post")
        if last and self.side != "left" and model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ConfigError(
                f"{site.short} is read by the unembedding, but the models number their tokens differently. Use another "
                "site, or side='left'."
            )
        return pairs

    def _null(self, pairs: Pairs, draw: int) -> float:
        """Largest singular value with the sign of every entry drawn anew."""
        generator = torch.Generator().manual_seed(self.seed + draw)

        def flipped() -> Iterator[Float64[Tensor, "b d"]]:
            for delta in _deltas(pairs):
                yield delta * (torch.randint(0, 2, delta.shape, generator=generator, dtype=torch.int8) * 2 - 1)

        return float(torch.linalg.eigvalsh(_gram(flipped()))[-1].clamp(min=0).sqrt())

    def _rank(self, singular: Float64[Tensor, " d"], edge: float) -> int:
        # squares of singular values are summed in float64, so their own relative accuracy is half its digits
        available = int((singular > 1e-7 * singular[0]).sum())
        if self.rank is not None:
            if self.rank > available:
                raise RankError(
                    f"rank={self.rank} was asked for, but the difference has rank {available}. Ask for less."
                )
            return self.rank
        if self.energy is not None:
            share = singular.square().cumsum(0) / singular.square().sum()
            return min(available, int((share < self.energy - 1e-12).sum()) + 1)
        return max(1, int((singular > edge).sum()))


def _names(matrices: list[Matrix]) -> str:
    return ", ".join(m.name for m in matrices)


def _noise_edge(singular: Float64[Tensor, " d"], n: int) -> float:
    """Largest singular value of n vectors of independent entries of one variance, with the same norm in all."""
    d = len(singular)
    return float(singular.square().sum() / (n * d)) ** 0.5 * (n**0.5 + d**0.5)


def _require_same_kind(model: HookedModel, other: HookedModel) -> None:
    differing = [
        f"{name} {getattr(model.spec, name)} and {getattr(other.spec, name)}"
        for name in _SHAPES
        if getattr(model.spec, name) != getattr(other.spec, name)
    ]
    if differing:
        raise ConfigError(
            f"{model.spec.name} and {other.spec.name} are of different architectures ({', '.join(differing)}), so "
            "their weights cannot be subtracted. Give two checkpoints of one model."
        )


def _deltas(pairs: Pairs) -> Iterator[Float64[Tensor, "b d"]]:
    for base, tuned in pairs:
        for a, b in zip(base.vectors(), tuned.vectors(), strict=True):
            yield b - a


def _gram(blocks: Iterator[Float64[Tensor, "b d"]]) -> Float64[Tensor, "d d"]:
    """Sum of outer products of all vectors: its eigenvalues are squared singular values of the stack."""
    first = next(blocks)
    total = first.T @ first
    for block in blocks:
        total += block.T @ block
    return total


def _norms(base: Matrix, tuned: Matrix) -> dict[str, float]:
    """Frobenius norms of the difference and of the base."""
    squares = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(base.vectors(), tuned.vectors(), strict=True):
        squares += torch.stack([(b - a).square().sum(), a.square().sum()])
    delta, size = squares.sqrt().tolist()
    return {"delta": delta, "base": size}


def _described(singular: Float64[Tensor, " d"], kept: int) -> dict[str, float | list[float]]:
    total = float(singular.square().sum())
    return {
        "singular_values": singular[: max(kept, _SHOWN)].tolist(),
        "energy": float(singular[:kept].square().sum()) / total if total else 0.0,
        "stable_rank": total / float(singular[0].square()) if total else 0.0,
        "delta_norm": total**0.5,
    }


def _oriented(
    basis: Float64[Tensor, "k d"], model: HookedModel, contrast: Contrast | None, site: Site, where: Where
) -> tuple[Float64[Tensor, " k"], Float[Tensor, " d"], str]:
    """A sign for every row, an origin, and what positive means."""
    if contrast is None:
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))[:, 0]
        return torch.where(largest < 0, -1.0, 1.0).double(), torch.zeros(basis.shape[1]), "largest entry positive"
    contrast.require_both_classes()
    acts = model.capture(contrast, sites=site, where=where)
    x, labels = acts.at(site).cpu().double(), acts.labels
    positive, negative = x[labels == 1].mean(0), x[labels == 0].mean(0)
    signs = torch.where(basis @ (positive - negative) < 0, -1.0, 1.0).double()
    return signs, (positive + negative) / 2, "towards label 1"
