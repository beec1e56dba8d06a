"""Pure tensor mathematics: bases, projections, angles, moments, resampling, ranks. No models, no nouns, no files.

Axis names, used in every annotation of this floor:

    n           rows: examples, draws or samples, as the function says
    d           width of one row: the dimension of the space
    k, l        rank of a subspace (rows of its basis)
    *b          any leading axes
    rows        rows of one batch
    draws       bootstrap samples; a block is some of them
    m           permutations, or resampled rows

A basis is `[k d]` with orthonormal rows. Cosines are signed; overlaps are not.
"""

from subspace_probe.linalg.angles import cosine, mode_subspace_overlap, overlap, principal_angles
from subspace_probe.linalg.bases import (
    complement,
    covariance_matched_directions,
    fix_sign,
    orthonormalise,
    random_directions,
    random_subspace,
)
from subspace_probe.linalg.heavy import heavy_rows
from subspace_probe.linalg.moments import Moments, class_moments
from subspace_probe.linalg.nulls import (
    chance_overlap,
    cosine_null,
    isotropic_cosine_quantile,
    isotropic_overlap_null,
    overlap_null,
    top_cosine_null,
)
from subspace_probe.linalg.permutations import permutation_p, permute_labels
from subspace_probe.linalg.projections import coords, lift, project, reject
from subspace_probe.linalg.ranking import auroc, auroc_interval
from subspace_probe.linalg.ranks import ParallelAnalysis, noise_edge, parallel_analysis
from subspace_probe.linalg.resampling import (
    bootstrap_interval,
    bootstrap_statistic,
    clopper_pearson,
    percentile_interval,
    split_halves,
    wilson_interval,
)

__all__ = [
    "Moments",
    "ParallelAnalysis",
    "auroc",
    "auroc_interval",
    "bootstrap_interval",
    "bootstrap_statistic",
    "chance_overlap",
    "class_moments",
    "clopper_pearson",
    "complement",
    "coords",
    "cosine",
    "cosine_null",
    "covariance_matched_directions",
    "fix_sign",
    "heavy_rows",
    "isotropic_cosine_quantile",
    "isotropic_overlap_null",
    "lift",
    "mode_subspace_overlap",
    "noise_edge",
    "orthonormalise",
    "overlap",
    "overlap_null",
    "parallel_analysis",
    "percentile_interval",
    "permutation_p",
    "permute_labels",
    "principal_angles",
    "project",
    "random_directions",
    "random_subspace",
    "reject",
    "split_halves",
    "top_cosine_null",
    "wilson_interval",
]
