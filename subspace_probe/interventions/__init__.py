"""Edits with a name: what they claim to do, at which sites, to which tokens."""

from subspace_probe.core.registry import Registry

INTERVENTIONS = Registry(
    "intervention",
    {
        "steer": "subspace_probe.interventions.steer:Steer",
        "ablate": "subspace_probe.interventions.ablate:Ablate",
        "patch": "subspace_probe.interventions.patch:Patch",
        "knob_clamp": "subspace_probe.interventions.knob:KnobClamp",
        "reroute": "subspace_probe.interventions.reroute:Reroute",
    },
    group="subspace_probe.interventions",
)
"""Name to class. A new intervention is one file and one line here."""

PARTS = Registry(
    "part",
    {
        "Source": "subspace_probe.interventions.sources:Source",
        "HalfSpace": "subspace_probe.interventions.targets:HalfSpace",
        "Move": "subspace_probe.interventions.moves:Move",
        "Score": "subspace_probe.interventions.rules:Score",
        "AllOf": "subspace_probe.interventions.rules:AllOf",
        "AnyOf": "subspace_probe.interventions.rules:AnyOf",
        "Not": "subspace_probe.interventions.rules:Not",
    },
    group="subspace_probe.parts",
)
"""What interventions are made of besides plain values, tensors and the nouns of the core; for their files."""
