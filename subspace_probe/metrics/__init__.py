"""Behaviour to one number a prompt.

A metric is any callable from last-token logits [n, d_vocab] and the prompts to n numbers. Those with a name are built
for a model, because which tokens stand for a behaviour is the model's own matter.
"""

from subspace_probe.core.protocols import Metric, TokenSource
from subspace_probe.core.registry import Registry

METRICS = Registry(
    "metric",
    {
        "refusal_score": "subspace_probe.metrics.behaviour:refusal_score",
        "judgement_score": "subspace_probe.metrics.behaviour:judgement_score",
        "logit_difference": "subspace_probe.metrics.answers:LogitDifference",
        "accuracy": "subspace_probe.metrics.answers:Accuracy",
    },
    group="subspace_probe.metrics",
)
"""Name to a class or function that is called with the model. A new metric is one file and one line here."""


def metric_for(metric: str | Metric, model: TokenSource) -> Metric:
    """The metric of that name for a model; a callable is returned as it is.

    Raises:
        UnknownName: no such metric.
        ConfigError: the model does not say which tokens stand for the behaviour.
    """
    return METRICS.load(metric)(model) if isinstance(metric, str) else metric


def name_of(metric: str | Metric) -> str:
    """How findings call a metric."""
    return metric if isinstance(metric, str) else getattr(metric, "name", None) or getattr(metric, "__name__", "metric")
