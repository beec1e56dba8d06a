"""From activations to a subspace."""

from subspace_probe.core.registry import Registry

FINDERS = Registry(
    "finder",
    {
        "mean_difference": "subspace_probe.finders.mean_difference:MeanDifference",
    },
    group="subspace_probe.finders",
)
"""Name to class. A new finder is one file and one line here."""
