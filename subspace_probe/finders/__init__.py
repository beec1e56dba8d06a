"""From activations to a subspace."""

from subspace_probe.core.registry import Registry

FINDERS = Registry(
    "finder",
    {
        "mean_difference": "subspace_probe.finders.mean_difference:MeanDifference",
        "pca": "subspace_probe.finders.pca:PCA",
        "factors": "subspace_probe.finders.factors:FactorSubspaces",
        "lda": "subspace_probe.finders.lda:LDA",
        "linear_probe": "subspace_probe.finders.linear_probe:LinearProbe",
        "leace": "subspace_probe.finders.leace:LEACE",
        "sae_latents": "subspace_probe.finders.sae_latents:SAELatents",
    },
    group="subspace_probe.finders",
)
"""Name to class. A new finder is one file and one line here."""

MODEL_FINDERS = Registry(
    "model finder",
    {
        "das": "subspace_probe.finders.das:DAS",
        "active_subspace": "subspace_probe.finders.active_subspace:ActiveSubspace",
        "weight_delta": "subspace_probe.finders.weight_delta:WeightDelta",
    },
    group="subspace_probe.model_finders",
)
"""Those that need the model itself, and not only its activations."""
