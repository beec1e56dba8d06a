"""The report in plain sentences, each from the findings it names."""

from collections.abc import Sequence

from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Table, number, span
from subspace_probe.guard.measured import Measured


def summary(measured: Measured, findings: Sequence[Finding]) -> Table:
    """A table of sentences."""
    found = {finding.name: finding for finding in findings}
    said = [
        _quality(measured, found),
        _slices(found),
        _promise(measured, found),
        _worth(found),
        _others(found),
        _doubts(found),
    ]
    said.append(_cost(found))
    return Table.of([{"sentence": sentence} for sentence in said if sentence], "The answer, from the findings.")


def _figure(finding: Finding) -> str:
    return f"{number(finding.estimate)} {span(finding.interval)}".strip()


def _quality(measured: Measured, found: dict[str, Finding]) -> str:
    guard, auroc = measured.guard, found["auroc"]
    how = {
        "supported": "above random directions and refits on shuffled labels",
        "unaudited": "not compared with anything, since no training prompts were given",
        "refuted": "no better than chance",
    }.get(auroc.verdict, "not clearly above random directions and refits on shuffled labels")
    layers = ", ".join(map(str, guard.layers))
    read = f"{guard.probe.method} at layer {layers} of {guard.model.spec.name}, {guard.where}"
    first = (
        f"The {guard.category} guard ({read}) has an AUROC of {_figure(auroc)} on {auroc.n} prompts that it was not "
        f"made from, {how}"
    )
    rate = found.get("tpr.at_fpr_1pct")
    if rate is None or rate.verdict == "not tested":
        return f"{first}; there are too few negatives to say what it finds at a false-positive rate of 1 %."
    return f"{first}; at a false-positive rate of 1 % it finds {_figure(rate)} of the positives."


def _slices(found: dict[str, Finding]) -> str:
    parts = {
        name.removeprefix("auroc."): finding
        for name, finding in found.items()
        if name.startswith("auroc.") and not name.startswith("auroc.held_out_source.") and finding.interval
    }
    if not parts:
        return ""
    worst = min(parts, key=lambda name: (parts[name].estimate, found[f"tpr.{name}"].estimate))
    return (
        f"Of {len(parts)} slices, {worst.replace('.', ' = ')} is its worst: AUROC {_figure(parts[worst])}, and "
        f"{_figure(found[f'tpr.{worst}'])} of the positives flagged."
    )


def _promise(measured: Measured, found: dict[str, Finding]) -> str:
    realised, recall = found["fpr.at_threshold"], found["recall.at_threshold"]
    held = measured.guard.threshold
    if held is None:
        return (
            f"No threshold is set: at the probe's own boundary it flags {_figure(realised)} of negatives and "
            f"{_figure(recall)} of positives."
        )
    kept = "breaks" if realised.verdict == "refuted" else "agrees with"
    said = (
        f"Its threshold promises a false-positive rate of at most {number(held.bound)} (confidence {held.level:g}); "
        f"here it is {_figure(realised)}, which {kept} that, and {_figure(recall)} of positives are found."
    )
    hard = found.get("fpr.hard_benign")
    return said if hard is None else f"{said} On hard benign prompts it flags {_figure(hard)}."


def _worth(found: dict[str, Finding]) -> str:
    stated = [finding for name, finding in found.items() if name.startswith("precision.base_rate_")]
    if not stated:
        return ""
    rarest = stated[0]
    rate = rarest.name.removeprefix("precision.base_rate_")
    return f"Where a share of {rate} of prompts is positive, {_figure(rarest)} of those flagged are."


def _others(found: dict[str, Finding]) -> str:
    ends, names = ".difference", {"tfidf": "a bag of words", "refusal_direction": "the refusal direction"}
    names["refusal_direction_at_guard"] = "the refusal direction read where the guard reads"
    parts: list[str] = []
    for name, finding in found.items():
        if name.startswith("baseline.") and name.endswith(ends):
            which = name.removeprefix("baseline.").removesuffix(ends)
            value = _figure(found[f"baseline.{which}.auroc"])
            better = {"supported": "the guard is better"}.get(finding.verdict, "the guard is not clearly better")
            parts.append(f"{names.get(which, which)} has {value} ({better})")
    return f"On the same prompts, {'; '.join(parts)}." if parts else ""


def _doubts(found: dict[str, Finding]) -> str:
    controls = {name: finding for name, finding in found.items() if name.startswith("control.")}
    against = [finding for finding in controls.values() if finding.verdict == "refuted"]
    untested = [name for name, finding in controls.items() if finding.verdict == "not tested"]
    if not controls:
        return ""
    said = [f"refuted: {finding.claim} ({finding.name}: {_figure(finding)})" for finding in against]
    if untested:
        said.append(f"not tested: {', '.join(untested)}")
    return f"Of the controls, {'; '.join(said)}." if said else "None of the controls speaks against it."


def _cost(found: dict[str, Finding]) -> str:
    if "latency.own_pass.ratio" not in found:
        return ""
    ratio, added = found["latency.own_pass.ratio"], found["latency.in_pass.added.p50"]
    own = found["latency.own_pass.p50"]
    return (
        f"Its own pass takes {_figure(own)} ms, {_figure(ratio)} of a bare forward pass ({ratio.note}); scored in a "
        f"pass that is made anyway it adds {_figure(added)} ms."
    )
