"""Streaming mean and scatter that merge exactly: one pass over data of any size, split over any number of workers.

Batches are centred in float64 before they are squared, and parts are joined by Chan's formula, so a large common mean
(usual in residual streams) costs no digits. Not a fitter: nothing here knows labels beyond grouping by them.
Background: Chan, Golub & LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115.
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

CHUNK_ROWS = 4096


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of the rows seen so far, float64 on the CPU.

    Immutable: `update` and `merge` return new objects. Merging is associative and the order does not matter, up to
    float64 rounding.

    >>> seen = Moments.empty(2).update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> seen.n, seen.mean.tolist(), seen.variance.tolist()
    (2, [2.0, 0.0], [2.0, 0.0])
    """

    n: int
    """Rows seen."""
    mean: Float64[Tensor, " d"]
    """Their mean; zero when `n == 0`."""
    scatter: Float64[Tensor, "d d"] | None
    """Sum over rows of the outer product of the row minus the mean; None when only means are kept."""

    @classmethod
    def empty(cls, d: int, *, second: bool = True) -> "Moments":
        """No rows yet.

        Args:
            d: Width of the rows to come.
            second: Keep the scatter too. False costs `d` numbers instead of `d * d`.
        """
        if d < 1:
            raise ValueError(
                f"Moments.empty was asked for width {d}; rows have width at least 1. Pass the site's width."
            )
        mean = torch.zeros(d, dtype=torch.float64)
        return cls(0, mean, torch.zeros(d, d, dtype=torch.float64) if second else None)

    def update(self, x: Float[Tensor, "rows d"]) -> "Moments":
        """These moments with the rows of `x` added; `x` may be of any floating dtype and on any device.

        Raises:
            ValueError: If the width differs or a row holds nan or inf (the message names the rows).
        """
        d = self.mean.shape[0]
        if x.shape[1] != d:
            raise ValueError(
                f"Moments.update was given rows of width {x.shape[1]}; these moments have width {d}. "
                "Keep one Moments for each site."
            )
        _check_finite(x)
        result = self
        for chunk in x.detach().split(CHUNK_ROWS):
            if len(chunk):
                result = result.merge(_of(chunk, second=self.scatter is not None))
        return result

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together (Chan et al. 1983, eq. 2.1).

        Raises:
            ValueError: If the widths differ, or only one of the two keeps a scatter.
        """
        if self.mean.shape != other.mean.shape or (self.scatter is None) != (other.scatter is None):
            raise ValueError(
                f"Moments.merge was given {_describe(self)} and {_describe(other)}; both must have one width and keep "
                "the same statistics. Build both with the same Moments.empty(d, second=...)."
            )
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        if self.scatter is None or other.scatter is None:
            return Moments(n, mean, None)
        between = torch.outer(delta, delta).mul_(self.n * other.n / n)
        return Moments(n, mean, between.add_(self.scatter).add_(other.scatter))

    def covariance(self, ddof: int = 1) -> Float64[Tensor, "d d"]:
        """Scatter over `n - ddof`: 1 for the unbiased estimate, 0 for the maximum-likelihood one.

        Raises:
            ValueError: If only means were kept or there are not more than `ddof` rows.
        """
        return self._scatter("covariance", ddof) / (self.n - ddof)

    @property
    def variance(self) -> Float64[Tensor, " d"]:
        """Unbiased variance of each coordinate: the diagonal of `covariance()`, without forming the rest.

        Raises:
            ValueError: If only means were kept or there are fewer than two rows.
        """
        return self._scatter("variance", 1).diagonal() / (self.n - 1)

    def _scatter(self, asked: str, ddof: int) -> Tensor:
        if self.scatter is None:
            raise ValueError(
                f"The {asked} was asked for; only means were kept. Build with Moments.empty(d, second=True)."
            )
        if self.n <= ddof:
            raise ValueError(f"The {asked} was asked for with ddof={ddof}; there are {self.n} rows. Add rows.")
        return self.scatter


def class_moments(
    batches: Iterable[tuple[Float[Tensor, "_ d"], Int[Tensor, " _"]]], d: int, second: bool = False
) -> dict[int, Moments]:
    """One pass over labelled batches: the moments of each class, keyed by label in ascending order.

    Args:
        batches: Rows `[rows d]` with integer labels `[rows]`, each batch of any length: `Activations.batches(site)`.
        d: Width of the rows.
        second: Keep scatters too; needed for covariances, not for mean differences.

    Returns:
        Only the labels that occur.

    Raises:
        ValueError: As `Moments.update`, or if a batch has another number of labels than rows.
    """
    found: dict[int, Moments] = {}
    for x, labels in batches:
        if len(x) != len(labels):
            raise ValueError(
                f"class_moments was given a batch of {len(x)} rows with {len(labels)} labels; "
                "they must match. Pass one label for each row."
            )
        _check_finite(x)
        for label in sorted(set(labels.tolist())):
            before = found.get(label) or Moments.empty(d, second=second)
            found[label] = before.update(x[(labels == label).to(x.device)])
    return dict(sorted(found.items()))


def _of(chunk: Tensor, *, second: bool) -> Moments:
    """The moments of one chunk, in float64 (on its own device where that has float64)."""
    rows = chunk.to("cpu" if chunk.device.type == "mps" else chunk.device).to(torch.float64)
    mean = rows.mean(dim=0)
    if not second:
        return Moments(len(rows), mean.cpu(), None)
    centred = rows - mean
    if centred.device.type == "cpu":
        block = centred.numpy()
        # NumPy recognises X'X and calls SYRK: half the work of torch's GEMM.
        scatter = torch.from_numpy(block.T @ block)
    else:
        scatter = (centred.T @ centred).cpu()
    return Moments(len(rows), mean.cpu(), scatter)


def _check_finite(x: Tensor) -> None:
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        rows: list[int] = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"Moments of {len(x)} rows were asked for; {len(rows)} hold nan or inf: rows {shown}. "
            "Drop them, or run the model in a wider dtype (float16 overflows)."
        )


def _describe(moments: Moments) -> str:
    return f"width {moments.mean.shape[0]} {'without' if moments.scatter is None else 'with'} scatter"
