"""What the features of a dictionary stand for, by F1 of where they are active against stated properties.

Makelov, Lange & Nanda 2024 (arXiv:2405.08366, section 4.3). With F1 >= a both precision and recall are at least
a / (2 - a): 0.8 gives 0.67, and 0.6 gives 0.43.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError, DataError

UNION = 10
"""The most values of an attribute that one property joins, as published for task dictionaries."""


@final
@dataclass(frozen=True)
class Property:
    """Prompts whose attributes have one of the values stated: of one attribute, or of two at once.

    Attributes:
        values: attribute and values, `(("io", (3, 5)),)` or `(("io", (3,)), ("position", (1,)))`.
    """

    values: tuple[tuple[str, tuple[int, ...]], ...]

    def holds(self, attributes: Mapping[str, Int[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        """Of which prompts it is true."""
        held = [torch.isin(attributes[name], torch.tensor(values)) for name, values in self.values]
        return torch.stack(held).all(0)

    def __str__(self) -> str:
        return " and ".join(f"{name} in {{{','.join(map(str, values))}}}" for name, values in self.values)


@final
@dataclass(frozen=True, eq=False)
class Interpretation:
    """The best property of each feature.

    Attributes:
        properties: one a feature.
        f1: on the prompts it was chosen on, shape [feature].
    """

    properties: tuple[Property, ...]
    f1: Float64[Tensor, " feature"]

    def truth(self, attributes: Mapping[str, Int[Tensor, " n"]]) -> Bool[Tensor, "n feature"]:
        """Of which prompts each feature's property holds."""
        return torch.stack([each.holds(attributes) for each in self.properties], 1)

    def score(
        self, active: Bool[Tensor, "n feature"], attributes: Mapping[str, Int[Tensor, " n"]]
    ) -> Float64[Tensor, " feature"]:
        """F1 of the same pairs of feature and property on other prompts: what choosing among many did not inflate."""
        return matched_f1(active, self.truth(attributes))


def matched_f1(active: Bool[Tensor, "n feature"], truth: Bool[Tensor, "n feature"]) -> Float64[Tensor, " feature"]:
    """F1 of each feature against its own property; 0 where neither ever holds."""
    return _f1((active & truth).sum(0).double(), active.sum(0).double(), truth.sum(0).double())


def f1_scores(
    active: Bool[Tensor, "n feature"], truth: Bool[Tensor, "n property"]
) -> Float64[Tensor, "feature property"]:
    """F1 of every feature's active set against every property; 0 where neither ever holds."""
    both = active.double().T @ truth.double()
    return _f1(both, active.double().sum(0)[:, None], truth.double().sum(0)[None])


def f1_bound(f1: float) -> float:
    """The least that precision and recall can be: a / (2 - a).

    >>> round(f1_bound(0.8), 2)
    0.67
    """
    return f1 / (2 - f1)


def interpret(
    active: Bool[Tensor, "n feature"], attributes: Mapping[str, Int[Tensor, " n"]], *, union: int = UNION
) -> Interpretation:
    """The property that each feature's active set fits best.

    Properties are: one value of an attribute; the union of up to `union` of its values; and one value of each of two
    attributes. The best union of m values is found exactly for every m where all values are equally frequent, and
    else approximately: values join in the order of the feature's rate among them.

    Raises:
        ConfigError: a union of fewer than one value.
        DataError: no attributes.
    """
    if union < 1:
        raise ConfigError(f"union={union} was given. A property joins at least 1 value.")
    if not attributes:
        raise DataError("No attributes were given, so there is no property that a feature could stand for.")
    n_features, total = active.shape[1], active.double().sum(0)
    best = torch.full((n_features,), -1.0, dtype=torch.float64)
    named: list[Property] = [Property(())] * n_features
    hot = {name: _one_hot(column) for name, column in attributes.items()}
    for name, (seen, truth) in hot.items():
        both, sizes = active.double().T @ truth, truth.sum(0)
        order = (both / sizes).argsort(dim=1, descending=True, stable=True)[:, :union]
        joined, size = both.gather(1, order).cumsum(1), sizes[order].cumsum(1)
        top, m = _f1(joined, total[:, None], size).max(1)
        for f in (top > best).nonzero().flatten().tolist():
            named[f] = Property(((name, tuple(sorted(seen[order[f, : int(m[f]) + 1]].tolist()))),))
        best = torch.maximum(best, top)
    names = list(hot)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            (seen1, truth1), (seen2, truth2) = hot[first], hot[second]
            cells = (truth1[:, :, None] * truth2[:, None]).flatten(1)
            top, cell = f1_scores(active, cells > 0).max(1)
            for f in (top > best).nonzero().flatten().tolist():
                v1, v2 = divmod(int(cell[f]), len(seen2))
                named[f] = Property(((first, (int(seen1[v1]),)), (second, (int(seen2[v2]),))))
            best = torch.maximum(best, top)
    return Interpretation(tuple(named), best)


def _one_hot(column: Int[Tensor, " n"]) -> tuple[Int[Tensor, " value"], Float64[Tensor, "n value"]]:
    seen = column.unique()
    return seen, (column[:, None] == seen).double()


def _f1(both: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """2 |A n B| / (|A| + |B|)."""
    return torch.where(first + second > 0, 2 * both / (first + second).clamp(min=1), 0.0)
