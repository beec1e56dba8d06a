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
        "exchange": "subspace_probe.diagnostics.exchange:Exchange",
        "containment": "subspace_probe.diagnostics.containment:Containment",
        "reader_split": "subspace_probe.diagnostics.reader_split:ReaderSplit",
        "dormancy": "subspace_probe.diagnostics.dormancy:Dormancy",
        "clamp": "subspace_probe.diagnostics.clamp:Clamp",
        "readable": "subspace_probe.diagnostics.readable:Readable",
        "elsewhere": "subspace_probe.diagnostics.elsewhere:Elsewhere",
    },
    group="subspace_probe.checks",
)
"""Name to class. A new check is one file and one line here; it then runs in every audit where it applies."""
