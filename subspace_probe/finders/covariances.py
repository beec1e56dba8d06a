"""One pass over rows with a factor: their moments, and each value's mean, as it is and under permuted values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.levels import coded
from subspace_probe.finders.permuting import permuted_codes, require_enough
from subspace_probe.linalg.moments import Moments, class_moments
from subspace_probe.linalg.permutations import permutation_p
from subspace_probe.linalg.shrinkage import inverse_times, oas, shrunk

Shrinkage = float | Literal["oas"]
"""The weight of the identity in a covariance, 0 to 1, or "oas" to have it estimated."""


@final
@dataclass(frozen=True, eq=False)
class FactorMoments:
    """What is left of the rows after the pass.

    Attributes:
        levels: the values of the factor, ascending, shape [m].
        total: moments of all rows.
        all_deviations: the mean of each value's rows less the mean of all rows, [1 + draws, m, d]: as the values are,
            then under each permutation of them.
        all_shares: the share of the rows that has each value, [1 + draws, m].
    """

    levels: Int[Tensor, " m"]
    total: Moments
    all_deviations: Float64[Tensor, "drawn m d"]
    all_shares: Float64[Tensor, "drawn m"]

    @property
    def deviations(self) -> Float64[Tensor, "m d"]:
        """The mean of each value's rows, less the mean of all rows."""
        return self.all_deviations[0]

    @property
    def shares(self) -> Float64[Tensor, " m"]:
        """The share of the rows that has each value."""
        return self.all_shares[0]

    @property
    def within(self) -> Float64[Tensor, "d d"]:
        """The covariance of the rows about their own value's mean, divided by the number of rows."""
        between = self.deviations.T @ (self.shares[:, None] * self.deviations)
        return self.total.covariance(ddof=0) - between

    def traces(self) -> Float64[Tensor, " drawn"]:
        """How much of the rows' variance lies between the values, as they are and under each permutation.

        Pillai's trace, sum_v p_v (m_v - m)' S^-1 (m_v - m), with the covariance S of all rows shrunk (OAS). S knows
        nothing of the values, so one factorisation serves all draws and the test is exact. Unshrunk, the trace would
        be the same under every permutation as soon as there are fewer rows than coordinates.
        """
        covariance = self.total.covariance(ddof=0)
        if float(covariance.trace()) == 0.0:
            return torch.zeros(len(self.all_shares), dtype=torch.float64)
        metric, _ = oas(covariance, self.total.n)
        solved = inverse_times(metric, self.all_deviations.flatten(0, 1)).reshape(self.all_deviations.shape)
        return ((solved * self.all_deviations).sum(dim=2) * self.all_shares).sum(dim=1)

    def test(self) -> dict[str, float | None]:
        """The trace, its 95 % point under permutation and its p-value; "p" is nan where nothing was drawn."""
        if len(self.all_shares) == 1:
            return {"trace": None, "null_trace_95": None, "p": float("nan")}
        traces = self.traces()
        trace, null = float(traces[0]), traces[1:]
        return {
            "trace": trace,
            "null_trace_95": float(null.quantile(0.95)),
            "p": permutation_p(trace, null, side="greater"),
        }


def factor_moments(fitting: Fitting, values: Int[Tensor, " n"], *, draws: int, seed: int) -> FactorMoments:
    """Read the rows once, in float64.

    Args:
        fitting: whose rows.
        values: the factor, one a row.
        draws: permutations, as pairs and groups allow.
        seed: of the permutations.

    Raises:
        ShapeError: non-finite activations, with the rows.
    """
    acts = fitting.acts
    levels, codes = coded(values)
    drawn = [permuted_codes(acts, codes, seed=seed + draw) for draw in range(draws)]
    if drawn:
        require_enough(torch.stack(drawn), fitting.finder.name)
    # narrow integers: a hundred draws of a million rows are 200 MB
    table = torch.stack([codes.short(), *(draw.short() for draw in drawn)])
    counts = torch.stack([(table == code).sum(dim=1) for code in range(len(levels))], dim=1).double()
    shares = counts / len(codes)
    sums = torch.zeros(len(table), len(levels), fitting.width, dtype=torch.float64)

    def watched() -> Iterator[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]]:
        start = 0
        for block, _ in fitting.batches():
            rows, stop = block.to("cpu", torch.float64), start + len(block)
            for code in range(len(levels)):
                # weights that add up to zero over all rows, so that a large common mean cancels
                sums[:, code] += ((table[:, start:stop] == code).double() - shares[:, code, None]) @ rows
            yield rows, torch.zeros(len(rows), dtype=torch.long)
            start = stop

    total = class_moments(watched(), fitting.width, second=True)[0]
    return FactorMoments(levels, total, sums / counts.clamp(min=1)[:, :, None], shares)


def check_shrinkage(name: str, shrinkage: Shrinkage) -> None:
    """Check that it is "oas" or a weight.

    Raises:
        ConfigError: it is neither.
    """
    if shrinkage != "oas" and not (not isinstance(shrinkage, str) and 0 <= shrinkage <= 1):
        raise ConfigError(
            f"{name} was given shrinkage={shrinkage!r}; it is 'oas' or a number from 0 (none) to 1 (the identity)."
        )


def shrunk_by(shrinkage: Shrinkage, covariance: Float64[Tensor, "d d"], n: int) -> tuple[Float64[Tensor, "d d"], float]:
    """The covariance shrunk as asked, and by how much."""
    if isinstance(shrinkage, str):
        return oas(covariance, n)
    return shrunk(covariance, float(shrinkage)), float(shrinkage)
