"""The two lines an audit ends in. Rules over the checks' own verdicts: margins belong to the checks, not here.

*Control*: does the intervention control the behaviour, specifically and reliably? *Mechanism*: is the subspace what
the model itself uses? Either can hold without the other, and no number sums them up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from subspace_probe.core.findings import Finding, Verdict

NULLS = ("control.random", "control.first_order")
"""Either shows an effect beyond that of random directions; the first is preferred."""
USE = "mechanism.exchange"
"""What the line on mechanism begins with: whether anything happens at all."""
REFUTE_CONTROL = ("control.integrity", "control.permutation", "control.matched", "control.specificity.kl",
                  "control.specificity.accuracy", "control.generalisation")  # fmt: skip
"""Refuted, one of these says that the behaviour is not controlled, or not by this, or not by this alone."""
KINDS = ("mechanism.reader_split", "mechanism.dormancy", "mechanism.clamp")
"""Two of these refuted refute a mechanism; one alone is seen in faithful subspaces as well (dormancy in a quarter)."""


def verdict_lines(findings: Sequence[Finding]) -> list[Finding]:
    """The lines `control` and `mechanism`, from the findings of the checks; only those whose question was asked."""
    by_name = {finding.name: finding for finding in findings}
    lines = [_control(by_name)] if any(name in by_name for name in NULLS) else []
    return [*lines, _mechanism(by_name)] if USE in by_name else lines


def _control(found: Mapping[str, Finding]) -> Finding:
    claim = "the intervention controls the behaviour, specifically and reliably"
    main = next((found[name] for name in NULLS if name in found and found[name].verdict != "not tested"), None)
    against = [found[name] for name in REFUTE_CONTROL if name in found and found[name].verdict == "refuted"]
    if main is None:
        reasons = "; ".join(dict.fromkeys(found[name].note for name in NULLS if name in found))
        return Finding("control", claim, float("nan"), verdict="not tested", note=reasons)
    line = replace(main, name="control", claim=claim, note="")
    if main.verdict == "refuted":
        return replace(line, verdict="refuted", note=f"no effect: {_say(main)}")
    if against:
        return replace(line, verdict="refuted", note="; ".join(map(_say, against)))
    if main.verdict == "supported":
        untested = [name for name in REFUTE_CONTROL if name not in found or found[name].verdict == "not tested"]
        left = f"; not tested: {', '.join(name.partition('.')[2] for name in untested)}" if untested else ""
        return replace(line, verdict="supported", note=f"beyond random directions, and nothing refutes it{left}")
    return replace(line, verdict=main.verdict, note=_say(main))


def _mechanism(found: Mapping[str, Finding]) -> Finding:
    claim = "the subspace is what the model itself uses for this behaviour"
    use = found[USE]
    if use.verdict == "not tested":
        return Finding("mechanism", claim, float("nan"), verdict="not tested", note=use.note)
    verdict, note = _rule(found, use, found.get("mechanism.containment"))
    return replace(use, name="mechanism", claim=claim, verdict=verdict, note=note)


def _rule(found: Mapping[str, Finding], use: Finding, containment: Finding | None) -> tuple[Verdict, str]:
    if use.verdict == "refuted":
        return _unused(found, use)
    against = [found[name] for name in KINDS if name in found and found[name].verdict == "refuted"]
    if containment is not None and containment.verdict == "refuted":
        return "refuted", f"{_say(containment)}; {_kind(against)}"
    if len(against) > 1:
        return "refuted", "; ".join(map(_say, against))
    if use.verdict != "supported":
        return "inconclusive", _say(use)
    if containment is None or containment.verdict == "not tested":
        return "not tested", "the whole component was not exchanged, so nothing bounds what a part of it may do"
    trained = found.get("mechanism.trained_nulls")
    if trained is not None and trained.verdict == "refuted":
        return "inconclusive", _say(trained)
    if containment.verdict != "supported":
        return "inconclusive", f"inflated: {_say(containment)}"
    doubt = f"; doubt: {_say(against[0])}" if against else ""
    return "supported", f"{_say(use)}; {_say(containment)}{doubt}"


def _kind(against: Sequence[Finding]) -> str:
    """What kind of illusion it is, where containment has found one."""
    if any(finding.name == "mechanism.dormancy" for finding in against):
        return "what acts is dormant: the model does not vary it by itself"
    if against:
        return "; ".join(map(_say, against))
    return "the rest of the state opposes it (cancellation), or it acts within the natural range"


def _unused(found: Mapping[str, Finding], use: Finding) -> tuple[Verdict, str]:
    """The second pattern: the variable is read there and nothing happens where it is exchanged."""
    readable, elsewhere = found.get("mechanism.readable"), found.get("mechanism.elsewhere")
    if readable is not None and elsewhere is not None:
        if readable.verdict == "supported" and elsewhere.verdict == "supported":
            return "refuted", f"readable, not used: {_say(readable)}; {_say(use)}; {_say(elsewhere)}"
        if elsewhere.verdict != "supported":
            return "inconclusive", f"{_say(use)}, but so does every exchange that was tried: {_say(elsewhere)}"
        return "inconclusive", f"{_say(use)}, and the variable is not read there either: {_say(readable)}"
    return "inconclusive", f"{_say(use)}; whether the variable is readable there was not tested"


def _say(finding: Finding) -> str:
    return finding.note or finding.claim
