"""Supervised feature dictionaries: one vector for each value of each attribute that is known of a prompt.

a(p) ~ abar + sum_i u[i, v_i(p)], with coefficients fixed at 1 (Makelov, Lange & Nanda 2024, arXiv:2405.08366, section
3). What the best dictionary could be, given the attributes: the skyline that learned dictionaries are held against.

    known = SupervisedDictionary.fit(acts.at(site), {"io": acts.factor("io"), "s": acts.factor("s")})
    edited = known.edit(states, "io", before=acts.factor("io"), after=wanted)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError, DataError, ShapeError, unknown

Codes = Literal["mse", "mean"]


@final
@dataclass(frozen=True, eq=False)
class SupervisedDictionary:
    """A mean state and a code for each value of each attribute.

    Attributes:
        mean: shape [d].
        values: by attribute, the values that were seen, ascending.
        codes: by attribute, one vector a value, shape [n_values, d]; weighted by how often each value was seen they
            sum to zero, so that no attribute holds part of the mean.
        kind: how they were fitted.
    """

    mean: Float[Tensor, " d"]
    values: Mapping[str, tuple[int, ...]]
    codes: Mapping[str, Float[Tensor, "_ d"]]
    kind: Codes = "mse"

    @classmethod
    def fit(
        cls, activations: Float[Tensor, "n d"], attributes: Mapping[str, Int[Tensor, " m"]], *, kind: Codes = "mse"
    ) -> "SupervisedDictionary":
        """Fit codes to states of one site.

        Args:
            activations: one state a prompt.
            attributes: by name, each prompt's value.
            kind: "mse", least squares of the centred states on all attributes at once; the smallest solution where
                attributes determine each other. "mean", for each value the mean of its states less the mean of all:
                the same where attributes are independent in these prompts, and else a value's code holds what comes
                along with it. Mean codes are zero if and only if no linear probe can beat a constant at the attribute
                (Belrose et al. 2023, arXiv:2306.03819), whatever other attributes there are.

        Raises:
            ConfigError: no attributes, or another kind.
            DataError: an attribute with fewer than two values, or no value for some prompt.
            ShapeError: states that are not finite, or another number of values than of states.
        """
        if not attributes or kind not in get_args(Codes):
            raise ConfigError(f"kind={kind!r}, attributes {list(attributes)}: name an attribute, and 'mse' or 'mean'.")
        if not bool(activations.isfinite().all()):
            raise ShapeError("Activations to fit a dictionary on are not finite. Leave these prompts out.")
        values: dict[str, tuple[int, ...]] = {}
        blocks: list[Float64[Tensor, "n _"]] = []
        for name, column in attributes.items():
            if len(column) != len(activations):
                raise ShapeError(f"{name!r} has {len(column)} values for {len(activations)} states. Give one each.")
            seen = column.unique()
            if len(seen) < 2:
                raise DataError(f"The attribute {name!r} has one value only, so no code can be told from the mean.")
            values[name] = tuple(seen.tolist())
            blocks.append((column[:, None] == seen).double())
        states = activations.detach().cpu().double()
        mean = states.mean(0)
        fitted = _fitted(blocks, states - mean, kind)
        codes = {name: block.to(activations.dtype) for name, block in zip(values, fitted, strict=True)}
        return cls(mean.to(activations.dtype), values, codes, kind)

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Attribute and value of each feature, in the order of `features`."""
        return tuple((name, value) for name, seen in self.values.items() for value in seen)

    @property
    def features(self) -> Float[Tensor, "feature d"]:
        """All codes, one row a feature."""
        return torch.cat([self.codes[name] for name in self.values])

    def code(self, name: str, column: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The code of each prompt's value of one attribute.

        Raises:
            UnknownName: no such attribute.
            DataError: a value that was not seen.
        """
        index = self._index(name, column)
        return self.codes[name][index]

    def encode(self, attributes: Mapping[str, Int[Tensor, " n"]]) -> Float[Tensor, "n feature"]:
        """Which features are active, from the attributes: 1 for each prompt's own values, else 0."""
        parts = [
            torch.nn.functional.one_hot(self._index(name, self._column(attributes, name)), len(seen))
            for name, seen in self.values.items()
        ]
        return torch.cat(parts, dim=1).to(self.mean.dtype)

    def decode(self, active: Float[Tensor, "n feature"]) -> Float[Tensor, "n d"]:
        """The mean and the active features' codes."""
        return self.mean + active @ self.features

    def reconstruct(self, attributes: Mapping[str, Int[Tensor, " n"]]) -> Float[Tensor, "n d"]:
        """What the dictionary makes of prompts with these attributes."""
        return self.decode(self.encode(attributes))

    def edit(
        self, x: Float[Tensor, "n d"], name: str, *, before: Int[Tensor, " n"], after: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """States with one attribute's value exchanged, x - u[before] + u[after]: one feature out, one in."""
        return x + (self.code(name, after) - self.code(name, before)).to(x)

    def weights(self, attributes: Mapping[str, Int[Tensor, " n"]]) -> dict[str, Float[Tensor, " n"]]:
        """Each attribute's share of the reconstruction, u.(ahat - abar) / |ahat - abar|^2; they sum to 1."""
        codes = {name: self.code(name, self._column(attributes, name)).double() for name in self.values}
        whole = torch.stack(list(codes.values())).sum(0)
        size = whole.square().sum(1)
        return {name: (code * whole).sum(1) / size for name, code in codes.items()}

    def _index(self, name: str, column: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        if name not in self.values:
            raise unknown("attribute", name, self.values)
        same = column[:, None].cpu() == torch.tensor(self.values[name])
        if not bool(same.any(1).all()):
            strange = sorted(set(column.tolist()) - set(self.values[name]))
            raise DataError(
                f"The dictionary has no code for {name}={strange[:10]}. Fit it on prompts with these values."
            )
        return same.long().argmax(1)

    def _column(self, attributes: Mapping[str, Int[Tensor, " n"]], name: str) -> Int[Tensor, " n"]:
        if name not in attributes:
            raise unknown("attribute", name, attributes)
        return attributes[name]


def _fitted(
    blocks: list[Float64[Tensor, "n _"]], centred: Float64[Tensor, "n d"], kind: Codes
) -> list[Float64[Tensor, "_ d"]]:
    """Codes of each attribute, none of which holds part of the mean."""
    counts = [block.sum(0) for block in blocks]
    if kind == "mean":
        return [(block.T @ centred) / count[:, None] for block, count in zip(blocks, counts, strict=True)]
    # the smallest solution: one-hot columns of several attributes always depend on each other
    both = torch.linalg.lstsq(torch.cat(blocks, 1), centred, driver="gelsd").solution
    parts = both.split([block.shape[1] for block in blocks])
    return [part - (count @ part) / count.sum() for part, count in zip(parts, counts, strict=True)]
