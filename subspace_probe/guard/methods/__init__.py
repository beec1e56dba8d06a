"""How a latent probe is fitted: one file a method.

Each is `fit(X, y, nuisance, settings) -> Rule`, with X [n, n_features] and y boolean.
"""

from subspace_probe.core.registry import Registry

METHODS = Registry(
    "guard method",
    {
        "centroid_cosine": "subspace_probe.guard.methods.centroid_cosine:fit",
        "mean_difference": "subspace_probe.guard.methods.mean_difference:fit",
        "lda": "subspace_probe.guard.methods.lda:fit",
        "logistic": "subspace_probe.guard.methods.logistic:fit",
        "factor": "subspace_probe.guard.methods.factor:fit",
    },
)
"""Name to function. A new method is one file and one line here."""

TAKE_NUISANCE = ("centroid_cosine", "factor")
"""Those that know what to do with a nuisance; the others refuse one."""
