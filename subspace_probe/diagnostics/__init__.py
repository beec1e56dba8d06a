"""Is it real? The checks that every intervention goes through."""

from subspace_probe.core.registry import Registry

CHECKS = Registry(
    "check",
    {
        "integrity": "subspace_probe.diagnostics.integrity:Integrity",
        "random_controls": "subspace_probe.diagnostics.random_controls:RandomControls",
        "label_permutation": "subspace_probe.diagnostics.label_permutation:LabelPermutation",
        "stability": "subspace_probe.diagnostics.stability:Stability",
        "dose_response": "subspace_probe.diagnostics.dose_response:DoseResponse",
        "specificity": "subspace_probe.diagnostics.specificity:Specificity",
    },
    group="subspace_probe.checks",
)
"""Name to class. A new check is one file and one line here; it then runs in every audit where it applies."""
