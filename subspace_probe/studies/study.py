"""What a study is: settings, and one function from a model to a report."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Provenance, Report
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True)
class Study:
    """One paper, one file.

    Attributes:
        title: what is asked.
        citation: the paper.
        Config: frozen dataclass of settings, a string under each saying when one would change it.
        run: `run(model, config, *, contrast=None, progress=True) -> Report`.
        presets: settings by name; `tiny` runs on an organism in seconds.
        organisms: what the preset `tiny` runs on where no model is given: for each case with a truth of its own, one
            organism a seed, taken in turn. A study of one case names it "".
    """

    title: str
    citation: str
    Config: type
    run: Callable[..., Report]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    organisms: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def provenance_of(model: HookedModel, config: Any, *, data: str, began: float, more: Mapping[str, Any]) -> Provenance:
    """Where a study's report comes from.

    Args:
        config: the study's settings, a dataclass with a `seed` whose fields all have defaults.
        data: the prompts, in words.
        began: `time.monotonic()` at the start.
        more: what the study found out about its own settings, such as the direction it chose.
    """
    settings, defaults = asdict(config), asdict(type(config)())
    return Provenance.now(
        model=model.spec.name,
        fingerprint=model.fingerprint,
        data=data,
        config={**settings, **more},
        given=tuple(name for name, value in settings.items() if defaults[name] != value),
        seed=config.seed,
        seconds=round(time.monotonic() - began, 1),
    )


def of_audits(reports: Mapping[str, Report]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Findings, and rows of the table `questions`, of several audits, each under the audit's name."""
    findings = [replace(f, name=f"{name}.{f.name}") for name, report in reports.items() for f in report.findings]
    questions = [
        {**row, "check": f"{name}.{row['check']}"}
        for name, report in reports.items()
        for row in report.tables["questions"].records()
    ]
    return findings, questions
