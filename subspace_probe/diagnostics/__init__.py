"""Is it real? The checks that every intervention goes through."""

from subspace_probe.core.registry import Registry

CHECKS = Registry(
    "check",
    {
        "integrity": "subspace_probe.diagnostics.integrity:Integrity",
        "exchange_integrity": "subspace_probe.diagnostics.exchange_integrity:ExchangeIntegrity",
        "first_order": "subspace_probe.diagnostics.first_order:FirstOrder",
        "exchange": "subspace_probe.diagnostics.exchange:Exchange",
        "containment": "subspace_probe.diagnostics.containment:Containment",
        "reader_split": "subspace_probe.diagnostics.reader_split:ReaderSplit",
        "dormancy": "subspace_probe.diagnostics.dormancy:Dormancy",
        "clamp": "subspace_probe.diagnostics.clamp:Clamp",
        "readable": "subspace_probe.diagnostics.readable:Readable",
        "elsewhere": "subspace_probe.diagnostics.elsewhere:Elsewhere",
        "generalisation": "subspace_probe.diagnostics.generalisation:Generalisation",
        "stability": "subspace_probe.diagnostics.stability:Stability",
        "random_controls": "subspace_probe.diagnostics.random_controls:RandomControls",
        "matched": "subspace_probe.diagnostics.matched:Matched",
        "label_permutation": "subspace_probe.diagnostics.label_permutation:LabelPermutation",
        "dose_response": "subspace_probe.diagnostics.dose_response:DoseResponse",
        "specificity": "subspace_probe.diagnostics.specificity:Specificity",
        "capacity": "subspace_probe.diagnostics.capacity:Capacity",
        "sensor": "subspace_probe.diagnostics.sensor:Sensor",
        "ledger": "subspace_probe.diagnostics.ledger:Ledger",
        "necessity": "subspace_probe.diagnostics.necessity:Necessity",
        "exchange_dose": "subspace_probe.diagnostics.exchange_dose:ExchangeDose",
        "metric_sensitivity": "subspace_probe.diagnostics.metric_sensitivity:MetricSensitivity",
        "off_distribution": "subspace_probe.diagnostics.off_distribution:OffDistribution",
        "downstream_clamp": "subspace_probe.diagnostics.downstream_clamp:DownstreamClamp",
        "interaction": "subspace_probe.diagnostics.interaction:Interaction",
        "mediation": "subspace_probe.diagnostics.mediation:Mediation",
        "writers_readers": "subspace_probe.diagnostics.writers_readers:WritersReaders",
        "trained_nulls": "subspace_probe.diagnostics.trained_nulls:TrainedNulls",
    },
    group="subspace_probe.checks",
)
"""Name to class. A new check is one file and one line here; it then runs in every audit where it applies.

Under a budget they are taken in this order: first what decides a verdict and costs little.
"""
