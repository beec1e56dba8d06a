"""The README's tables of methods, generated from the registries, so that they cannot fall behind."""

import inspect
import textwrap

from subspace_probe.core.registry import Registry
from subspace_probe.diagnostics import CHECKS
from subspace_probe.finders import FINDERS, MODEL_FINDERS
from subspace_probe.interventions import INTERVENTIONS
from subspace_probe.metrics import METRICS
from subspace_probe.studies import STUDIES

FITTED: dict[str, Registry] = {"Finders, from activations": FINDERS, "Finders, from the model": MODEL_FINDERS}
TABLES: dict[str, Registry] = {
    "Interventions": INTERVENTIONS,
    "Checks": CHECKS,
    "Metrics": METRICS,
    "Studies": STUDIES,
}


def methods() -> str:
    """One Markdown table a registry: the name, and the first line of its docstring (of a study, its question).

    Finders also say when to use them and what they cost.
    """
    parts: list[str] = []
    for title, registry in FITTED.items():
        rows = [
            f"| `{name}` | {_says(entry)} | {getattr(entry, 'use', '')} | {getattr(entry, 'cost', '')} |"
            for name, entry in ((name, registry.load(name)) for name in registry.table)
        ]
        parts.append("\n".join([f"| {title} | | use it | cost |", "|---|---|---|---|", *rows]))
    for title, registry in TABLES.items():
        rows = [f"| `{name}` | {_says(registry.load(name))} |" for name in registry.table]
        parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _says(entry: object) -> str:
    if title := getattr(entry, "title", ""):
        return f"{title} ({getattr(entry, 'citation', '')})"
    if question := getattr(entry, "question", ""):
        return str(question)
    return " ".join(textwrap.dedent(inspect.getdoc(entry) or "").split("\n\n")[0].split())
