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
UNRELIABLE = ("control.stability", "control.dose")
"""Refuted, one of these leaves control open: it works here, but not reliably."""
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
    doubts = [found[name] for name in UNRELIABLE if name in found and found[name].verdict == "refuted"]
    if doubts:
        return replace(line, verdict="inconclusive", note=f"not reliably: {'; '.join(map(_say, doubts))}")
    if main.verdict == "supported":
        untested = [name for name in REFUTE_CONTROL if name not in found or found[name].verdict == "not tested"]
        note = f"beyond random directions, and nothing that was tested refutes it{_left(untested)}"
        return replace(line, verdict="supported", note=note)
    return replace(line, verdict=main.verdict, note=_say(main))


def _left(untested: Sequence[str]) -> str:
    return f"; not tested: {', '.join(name.partition('.')[2] for name in untested)}" if untested else ""


def _mechanism(found: Mapping[str, Finding]) -> Finding:
    claim = "the subspace is what the model itself uses for this behaviour"
    use = found[USE]
    if use.verdict == "not tested":
        return Finding("mechanism", claim, float("nan"), verdict="not tested", note=use.note)
    verdict, note = _rule(found, use, found.get("mechanism.containment"))
    return replace(use, name="mechanism", claim=claim, verdict=verdict, note=note)


def _rule(found: Mapping[str, Finding], use: Finding, containment: Finding | None) -> tuple[Verdict, str]:
    own = found.get("mechanism.exchange_integrity")
    if own is not None and own.verdict == "refuted":
        return "inconclusive", f"exchanges cannot be trusted here: {_say(own)}"
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
    readable = found.get("mechanism.readable")
    doubts = against + ([readable] if readable is not None and readable.verdict == "refuted" else [])
    doubt = f"; doubt: {'; '.join(map(_say, doubts))}" if doubts else ""
    untested = [name for name in KINDS if name not in found or found[name].verdict == "not tested"]
    return "supported", f"{_say(use)}; {_say(containment)}{doubt}{_left(untested)}"


def _kind(against: Sequence[Finding]) -> str:
    """What kind of illusion it is, where containment has found one."""
    if any(finding.name == "mechanism.dormancy" for finding in against):
        return "what acts is dormant: the model does not vary it by itself"
    if against:
        return "; ".join(map(_say, against))
    return "the rest of the state opposes it (cancellation), or it acts within the natural range"


def _unused(found: Mapping[str, Finding], use: Finding) -> tuple[Verdict, str]:
    """The second pattern: the variable is read there and nothing happens where it is exchanged."""
    readable, elsewhere = (
        finding if (finding := found.get(name)) is not None and finding.verdict != "not tested" else None
        for name in ("mechanism.readable", "mechanism.elsewhere")
    )
    if elsewhere is None:
        return "inconclusive", f"{_say(use)}; no exchange elsewhere was tried, so nothing shows that any would work"
    if elsewhere.verdict != "supported":
        return "inconclusive", f"{_say(use)}, but so do other exchanges: {_say(elsewhere)}"
    if readable is None:
        return "inconclusive", f"{_say(use)}; whether the variable can be read there was not tested"
    if readable.verdict == "supported":
        return "refuted", f"readable, not used: {_say(readable)}; {_say(use)}; {_say(elsewhere)}"
    word = "is not read there either" if readable.verdict == "refuted" else "may or may not be read there"
    return "inconclusive", f"{_say(use)}, and the variable {word}: {_say(readable)}"


def _say(finding: Finding) -> str:
    return finding.note or finding.claim
