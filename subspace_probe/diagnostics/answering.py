"""From the findings of `explain_no_effect` to an answer: the likeliest cause first, in plain words."""

from collections.abc import Mapping, Sequence

from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Table
from subspace_probe.diagnostics.no_effect import GONE
from subspace_probe.diagnostics.variants import NOTHING, WORKS, Look

Answer = tuple[str, str, str]
"""The cause in one word, the answer in a sentence, and the finding it rests on."""


def ranked(look: Look, found: Mapping[str, Finding]) -> list[Answer]:
    """Every cause that the findings speak for, the likeliest first."""
    of = {name.removeprefix("no_effect."): finding for name, finding in found.items()}
    if not bool(look.here.moved.any()):
        text = (
            "It moved no state: its strength is zero, its rule never holds, or states are already where it puts them:"
        )
        return [("idle", f"{text} {_say(of['fired'])}", "no_effect.fired")]
    effect = of["effect"]
    real = effect.verdict == "supported"
    if real and abs(effect.estimate) >= WORKS:
        return [("works", f"It does have an effect: {_say(effect)}", "no_effect.effect"), *_beside(of)]
    answers = [*_lost(look, of), *_remedies(look, of)]
    if real:
        answers.append(("weak", f"It has an effect, but a small one: {_say(effect)}", "no_effect.effect"))
    elif effect.verdict == "unaudited":
        text = f"Too few prompts to tell whether it has an effect: {_say(effect)}"
        answers.append(("few", text, "no_effect.effect"))
    elif abs(effect.estimate) >= NOTHING:
        text = f"It has an effect, but one that cannot be told from that of random directions: {_say(effect)}"
        answers.append(("disturbs", text, "no_effect.effect"))
    answers += [*_reasons(of, look.used), *_beside(of)]
    if not answers:
        text = "Nothing that was tried moves the metric on these prompts: look at the metric (is it saturated?) and at "
        answers.append(("metric", f"{text}the prompts. {_say(effect)}", "no_effect.effect"))
    return answers


def _lost(look: Look, of: Mapping[str, Finding]) -> list[Answer]:
    """Moves of which nothing arrives."""
    if of["arrives"].estimate > GONE:
        return []
    if "overwritten" in of["arrives"].note:
        return [("overwritten", f"The move is overwritten later: {_say(of['arrives'])}", "no_effect.arrives")]
    where, site = look.case.intervention.where, look.site.short
    text = f"Nothing behind {site} reads {where}: the move stays where it was made."
    better = of["layers"].verdict == "supported"
    if better or of["tokens"].verdict != "supported":
        more = f" The same works at another layer ({_say(of['layers'])})." if better else ""
        return [("layer", f"{text}{more}", "no_effect.arrives")]
    return [("tokens", f"{text} At other tokens it works ({_say(of['tokens'])}).", "no_effect.arrives")]


def _remedies(look: Look, of: Mapping[str, Finding]) -> list[Answer]:
    """What works instead; too small a move is the likeliest cause where it is one, else whatever does most."""
    said = {
        "strength": "The strength is too small, a larger one works",
        "tokens": "These are the wrong tokens, at others the same works",
        "layers": "This is the wrong layer, at another the same works",
    }
    works = [name for name in said if of[name].verdict == "supported"]
    if of["arrives"].estimate <= GONE:  # said with the reason
        works = []
    small = of["size"].verdict != "supported"
    works.sort(key=lambda name: (not (small and name == "strength"), name == "strength", -abs(of[name].estimate)))
    return [
        ("layer" if name == "layers" else name, f"{said[name]}: {_say(of[name])}", f"no_effect.{name}")
        for name in works
    ]


def _reasons(of: Mapping[str, Finding], used: float | None) -> list[Answer]:
    """Why nothing works: the direction, or the site; or there is little to act on, where its exchange does work."""
    answers: list[Answer] = []
    if used is not None and abs(used) >= WORKS:
        text = "The subspace is used, but these prompts give the intervention little to do along it: exchanged between "
        text += f"prompts that differ, it works ({_say(of['whole'])}); {_say(of['size'])}"
        return [("little", text, "no_effect.whole")]
    if of["read"].verdict == "refuted" and of["whole"].verdict != "refuted" and of["arrives"].estimate > GONE:
        there = " although the site is: its whole state moves the behaviour" * (of["whole"].verdict == "supported")
        text = f"The direction is not read{there}: {_say(of['read'])}; {_say(of['whole'])}"
        answers.append(("direction", text, "no_effect.read"))
    if of["whole"].verdict == "refuted":
        text = f"What is there does not matter for this behaviour: {_say(of['whole'])}"
        answers.append(("site", text, "no_effect.whole"))
    return answers


def _beside(of: Mapping[str, Finding]) -> list[Answer]:
    """What else is wrong, whether or not there is an effect."""
    answers: list[Answer] = []
    if of["text"].verdict == "refuted":
        answers.append(("gibberish", f"What it writes is no text any more: {_say(of['text'])}", "no_effect.text"))
    if of["concept"].verdict == "refuted":
        text = f"The subspace carries the prompt rather than the concept: {_say(of['concept'])}"
        answers.append(("prompt", text, "no_effect.concept"))
    return answers


def said_of(answers: Sequence[Answer], findings: Sequence[Finding]) -> dict[str, Table]:
    """The answers as tables: the likeliest as the summary, all by rank, and the questions that users ask."""
    cause, first, evidence = answers[0]
    by_name = {finding.name: finding for finding in findings}
    rows = [
        {"rank": rank, "cause": one, "answer": text, "finding": name}
        for rank, (one, text, name) in enumerate(answers, 1)
    ]
    asked = [{"check": evidence, "question": "Why does it have no effect?" if cause != "works" else "Has it an effect?",
              "answer": first, "verdict": by_name[evidence].verdict}]  # fmt: skip
    for name, question in (
        ("no_effect.text", "Why gibberish?"),
        ("no_effect.concept", "Is it the concept or the prompt?"),
    ):
        if name in by_name:
            finding = by_name[name]
            asked.append({"check": name, "question": question, "answer": _say(finding), "verdict": finding.verdict})
    return {
        "summary": Table.of([{"sentence": first}]),
        "answers": Table.of(rows, "what the findings speak for, the likeliest first"),
        "questions": Table.of(asked, "what users ask, and the finding that answers"),
    }


def _say(finding: Finding) -> str:
    return finding.note or finding.claim
