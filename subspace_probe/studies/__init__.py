"""One paper, one file: from a model to a report."""

from subspace_probe.core.registry import Registry

STUDIES = Registry(
    "study",
    {
        "context_knob": "subspace_probe.studies.context_knob:STUDY",
        "harmfulness": "subspace_probe.studies.harmfulness:STUDY",
        "refusal_direction": "subspace_probe.studies.refusal_direction:STUDY",
    },
    group="subspace_probe.studies",
)
"""Name to `Study`. A new study is one file and one line here."""
