"""How many components stand out of noise: parallel analysis in closed form.

The eigenvalues of the correlation matrix are compared with the largest that independent coordinates would have through
as few rows. Keeping a share of the variance instead keeps noise: with 8 planted components in 256 dimensions "99 % of
the variance" keeps more than 200. Horn 1965, https://doi.org/10.1007/BF02289447 (parallel analysis, by simulation);
Dobriban & Owen 2019, https://arxiv.org/abs/1711.04155 (the edge in its place); Johnstone 2001,
https://doi.org/10.1214/aos/1009210544 (the law of the largest eigenvalue).
"""

# torch and scipy leave much untyped; everything here is annotated at its own edges.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Float64
from scipy.special import gammaincc, gammainccinv
from torch import Tensor

# The Tracy-Widom law of real matrices as a shifted gamma law (Chiani 2014, https://arxiv.org/abs/1209.3394, table I):
# its mean, variance and skewness are right, its distribution function to 1e-3.
_SHAPE, _SCALE, _SHIFT = 46.446, 0.186054, 9.84801


@final
@dataclass(frozen=True, eq=False)
class ParallelAnalysis:
    """What parallel analysis found.

    Attributes:
        rank: eigenvalues above the threshold.
        eigenvalues: of the correlation matrix, largest first, shape [m], m = min(d, degrees of freedom).
        p: how probable as large an eigenvalue is as the largest of noise, one an eigenvalue, shape [m].
        threshold: what the largest eigenvalue of noise stays below in 95 % of cases.
        centre, scale: of the largest eigenvalue of noise.
    """

    rank: int
    eigenvalues: Float64[Tensor, " m"]
    p: Float64[Tensor, " m"]
    threshold: float
    centre: float
    scale: float

    def p_of(self, values: Float64[Tensor, " k"]) -> Float64[Tensor, " k"]:
        """How probable values as large are as the largest eigenvalue of noise."""
        x = ((values - self.centre) / self.scale).clamp(min=-_SHIFT)
        return torch.from_numpy(gammaincc(_SHAPE, ((x + _SHIFT) / _SCALE).numpy()))


def parallel_analysis(
    covariance: Float[Tensor, "d d"], n: int, *, ddof: int = 1, level: float = 0.05
) -> ParallelAnalysis:
    """Parallel analysis from moments alone: no pass over the data, no simulation, no seed.

    Noise has independent coordinates. Each is brought to variance one, as in Horn's original, so that a coordinate that
    merely varies much is no component; the largest eigenvalue of noise then follows the law of Tracy and Widom about
    the edge of the Marchenko-Pastur law (Bao, Pan & Zhou 2012, https://arxiv.org/abs/1110.5208, for correlations).

    Rescaling coordinates and permuting them change nothing. A rotation does: which coordinates are independent under
    the null is part of the question. Weak components behind strong ones may be missed; they are not invented.

    Args:
        covariance: `[d d]`, scatter over `n - ddof`.
        n: Independent rows behind it. Where rows are not independent give the number of groups: as if each group were
            one row, which makes the null wider and errs to the safe side.
        ddof: Means taken off: 1 about the overall mean, 2 about each of two class means. 0 for second moments about
            zero, as of differences within pairs; the null is then noise symmetric about zero (every row as likely with
            either sign), and a mean of the differences counts as a component.
        level: How often something is found in pure noise.

    Raises:
        ValueError: If there are not more than `ddof` rows, `level` is not in (0, 1), or the covariance is not finite.
    """
    dof = n - ddof
    if dof < 1 or ddof < 0 or not 0.0 < level < 1.0:
        raise ValueError(
            f"parallel_analysis was asked for n={n}, ddof={ddof}, level={level}; it needs n > ddof >= 0 and a level "
            "between 0 and 1. Add rows, or change them."
        )
    work = covariance.detach().to("cpu", torch.float64)
    if not bool(work.isfinite().all()):
        raise ValueError("parallel_analysis was given a covariance with nan or inf. Look for overflow in the rows.")
    variances = work.diagonal()
    alive = variances > 1e-12 * variances.max().clamp(min=0)  # a constant coordinate has no correlations
    if int(alive.sum()) < 2:
        ones = torch.ones(int(alive.sum()), dtype=torch.float64)
        return ParallelAnalysis(0, ones, ones, 1.0, 1.0, 1.0)
    deviations = variances[alive].sqrt()
    correlations = work[alive][:, alive] / torch.outer(deviations, deviations)
    eigenvalues = torch.linalg.eigvalsh((correlations + correlations.T) / 2).flip(0)[:dof].clamp(min=0)
    centre, scale = noise_edge(len(deviations), dof)
    threshold = centre + scale * (float(gammainccinv(_SHAPE, level)) * _SCALE - _SHIFT)
    found = ParallelAnalysis(int((eigenvalues > threshold).sum()), eigenvalues, eigenvalues, threshold, centre, scale)
    return replace(found, p=found.p_of(eigenvalues))


def noise_edge(d: int, n: int) -> tuple[float, float]:
    """Centre and scale of the largest eigenvalue of the covariance of `n` rows of `d` independent unit coordinates.

    `(sqrt(n - 1/2) + sqrt(d - 1/2))^2 / n` and `(sqrt(n - 1/2) + sqrt(d - 1/2)) / n * (1 / sqrt(n - 1/2) +
    1 / sqrt(d - 1/2))^(1/3)`: Johnstone 2001, theorem 1, with the halves that make it accurate for small matrices (Ma
    2012, https://arxiv.org/abs/0810.1329).

    Raises:
        ValueError: If `d < 1` or `n < 1`.

    >>> round(noise_edge(100, 400)[0], 2)  # about (1 + sqrt(100 / 400))^2
    2.24
    """
    if d < 1 or n < 1:
        raise ValueError(f"noise_edge was asked for {n} rows of {d} coordinates; there is at least one of each.")
    rows, columns = math.sqrt(n - 0.5), math.sqrt(d - 0.5)
    return (rows + columns) ** 2 / n, (rows + columns) / n * (1 / rows + 1 / columns) ** (1 / 3)
