"""Streaming mean and scatter that merge exactly: one pass over data of any size, split over any number of workers.

Chunks are centred on their own mean before they are squared, and joined by Chan's formula in float64, so neither a
large common mean (usual in residual streams) nor one that drifts costs digits. Products of float32 and narrower rows
are taken in float32, which is twice as fast and errs by a few 1e-7 of the coordinates' spread; float64 rows keep
float64. Not a fitter: nothing here knows labels beyond grouping by them.
Background: Chan, Golub & LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115.
"""

# torch leaves its linear algebra untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.linalg.finite import all_finite

CHUNK_ROWS = 4096
# A chunk's sums of squares outside of this range are taken again in float64: float32 would overflow or lose digits.
_SAFE_SQUARES = (1e-25, 1e37)


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

        The new object costs a `d * d` matrix, so batches of thousands of rows go faster than many small ones.

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
        running = _Running(self)
        running.add(x)
        return running.moments

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
        return _joined(self, _Part(other.n, other.mean, other.scatter), in_place=False)

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
    found: dict[int, _Running] = {}
    for x, labels in batches:
        if len(x) != len(labels):
            raise ValueError(
                f"class_moments was given a batch of {len(x)} rows with {len(labels)} labels; "
                "they must match. Pass one label for each row."
            )
        _check_finite(x)
        for label in sorted(set(labels.tolist())):
            running = found.setdefault(label, _Running(Moments.empty(d, second=second)))
            running.add(x[(labels == label).to(x.device)])
    return {label: found[label].moments for label in sorted(found)}


class _Part(NamedTuple):
    """What one chunk contributes: mean in float64, scatter in the dtype its products were taken in; both on the CPU."""

    n: int
    mean: Tensor
    scatter: Tensor | None


@final
class _Running:
    """Moments under way. The first chunk makes a new scatter, the ones after it are added to that in place."""

    def __init__(self, start: Moments) -> None:
        self.moments = start
        self._owned = False

    def add(self, x: Tensor) -> None:
        """Add finite rows."""
        for chunk in x.detach().split(CHUNK_ROWS):
            if len(chunk):
                part = _part(chunk, second=self.moments.scatter is not None)
                self.moments = _joined(self.moments, part, in_place=self._owned)
                self._owned = True


def _joined(seen: Moments, part: _Part, *, in_place: bool) -> Moments:
    """Chan et al. 1983, eq. 2.1; `in_place` writes the scatter over `seen`'s."""
    if seen.n == 0:
        return Moments(part.n, part.mean, None if part.scatter is None else part.scatter.double())
    n = seen.n + part.n
    delta = part.mean - seen.mean
    mean = seen.mean + delta * (part.n / n)
    if seen.scatter is None or part.scatter is None:
        return Moments(n, mean, None)
    join = torch.Tensor.addr_ if in_place else torch.addr
    return Moments(n, mean, join(seen.scatter, delta, delta, alpha=seen.n * part.n / n).add_(part.scatter))


def _part(chunk: Tensor, *, second: bool) -> _Part:
    """The moments of one chunk, computed on its own device where that has float64."""
    rows = chunk.cpu() if chunk.device.type == "mps" else chunk
    rows = rows if rows.dtype == torch.float64 else rows.float()
    # NumPy adds narrow rows into a wide sum without a wide copy of them, at 3 times torch's speed.
    sums = torch.from_numpy(np.sum(rows.numpy(), 0, dtype=np.float64)) if _on_cpu(rows) else rows.double().sum(0)
    mean = sums / len(rows)
    if not second:
        return _Part(len(rows), mean.cpu(), None)
    centre = mean if rows.dtype == torch.float64 else _short(mean, rows).to(rows.dtype)
    scatter = _gram(rows - centre)
    if scatter.dtype != torch.float64:
        low, high = _SAFE_SQUARES
        squares = scatter.diagonal()
        if not bool(((squares > low) & (squares < high)).all()):
            return _part(rows.double(), second=True)
        rest = (mean - centre).to(scatter.dtype)  # the rows' mean about a centre that is not quite their mean
        scatter.addr_(rest, rest, alpha=-len(rows))
    return _Part(len(rows), mean.cpu(), scatter.cpu())


def _short(mean: Tensor, rows: Tensor) -> Tensor:
    """The mean in steps of about 1/16 of each coordinate's deviation; the usual value of one that hardly varies.

    Where rows repeat a few values (bfloat16, zeros after a ReLU, counts), products about the full mean repeat too,
    and so does the rounding of their sum, always the same way. About a mean of few bits such products are exact.
    """
    # A rough deviation will do. Steps of the golden ratio, since every 64th row may be the first token of a text.
    index = (torch.arange(64, device=rows.device) * (0.618 * len(rows))).remainder(len(rows)).long()
    sample = rows[index].double()
    step = sample.std(0, correction=0).log2().floor().sub(4).exp2()
    return torch.where(step > 0, (mean / step).round() * step, sample[0])


def _gram(y: Tensor) -> Tensor:
    """`y.T @ y`, float32 only where float32 products really are."""
    if _on_cpu(y):
        block = y.contiguous().numpy()
        # NumPy recognises X'X and calls SYRK: half the work of torch's GEMM.
        with np.errstate(over="ignore", invalid="ignore"):  # looked at afterwards
            return torch.from_numpy(block.T @ block)
    with torch.autocast(y.device.type, enabled=False):
        if torch.get_float32_matmul_precision() != "highest":
            y = y.double()  # the user has allowed TF32 products, which keep 3 digits
        return y.T @ y


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _check_finite(x: Tensor) -> None:
    if not all_finite(x):
        rows: list[int] = (~torch.isfinite(x).all(dim=1)).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"Moments of {len(x)} rows were asked for; {len(rows)} hold nan or inf: rows {shown}. "
            "Drop them, or run the model in a wider dtype (float16 overflows)."
        )


def _describe(moments: Moments) -> str:
    return f"width {moments.mean.shape[0]} {'without' if moments.scatter is None else 'with'} scatter"
