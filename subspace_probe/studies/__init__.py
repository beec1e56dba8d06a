"""One paper, one file: from a model to a report."""

from subspace_probe.core.registry import Registry

STUDIES = Registry(
    "study",
    {
        "context_knob": "subspace_probe.studies.context_knob:STUDY",
        "harmfulness": "subspace_probe.studies.harmfulness:STUDY",
        "latent_guard": "subspace_probe.studies.latent_guard:STUDY",
        "patching_illusion": "subspace_probe.studies.patching_illusion:STUDY",
        "refusal_direction": "subspace_probe.studies.refusal_direction:STUDY",
        "sae_evaluation": "subspace_probe.studies.sae_evaluation:STUDY",
        "unlearning": "subspace_probe.studies.unlearning:STUDY",
        "rerouting": "subspace_probe.studies.rerouting:STUDY",
        "safety_subspaces": "subspace_probe.studies.safety_subspaces:STUDY",
    },
    group="subspace_probe.studies",
)
"""Name to `Study`. A new study is one file and one line here."""
