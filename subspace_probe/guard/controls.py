"""What else could make a guard look good: single words, length, the template around the prompt."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np
from jaxtyping import Int

from subspace_probe.core.findings import Finding, Interval, judge_absence
from subspace_probe.core.prompts import Prompt, asking
from subspace_probe.core.reports import Table
from subspace_probe.core.tokens import LAST, T_INST
from subspace_probe.guard.baselines import BagOfWords
from subspace_probe.guard.masking import KEYWORDS, counted, keywords_of, others, replaced, stand_ins
from subspace_probe.guard.measured import Measured
from subspace_probe.guard.ranked import AUROC

MARGIN = 0.05
"""The loss of AUROC that counts as none; and how near to 0.5 is chance."""
WRAPPER = "Question: {x}"
NEAR = 0.05
"""Lengths within about such a share of each other count as equal."""
FEW = 20
CHANCE = Interval(0.5, 0.5, of="chance")
NONE = float("nan")


@final
@dataclass(frozen=True, eq=False)
class Control:
    """The guard under one control.

    Attributes:
        name: of the control.
        auroc: with its interval, after the change.
        bag: AUROC of the bag of words after it; NaN without one.
        n: prompts.
        note: what was changed.
    """

    name: str
    auroc: float
    interval: Interval
    bag: float
    n: int
    note: str


def keyword_control(
    measured: Measured, bag: BagOfWords, keywords: Literal["auto"] | Sequence[str]
) -> tuple[list[Finding], list[Control]]:
    """The test prompts with the words that speak most for the positive class replaced by neutral ones."""
    words = _telling(measured, bag) if isinstance(keywords, str) else tuple(word.lower() for word in keywords)
    prompts, before = measured.examples.prompts, measured.ranked.value(AUROC)
    counts = counted(prompts)
    times = sum(counts[word] for word in words)
    claim = "the guard reads more than single words: it tells the classes apart with the telling ones replaced"
    if not times:
        note = f"none of the {len(words)} words stands in these prompts"
        return [Finding("control.keyword_masked", claim, NONE, verdict="not tested", note=note)], []
    control = others(words, prompts, bag, seed=measured.seed)
    found = [_masked(measured, bag, name, w) for name, w in (("keywords", words), ("other words", control))]
    masked, other = found
    finding = Finding("control.keyword_masked", claim, masked.auroc, masked.interval, CHANCE, masked.n)
    note = (
        f"{len(words)} words replaced {times} times; {before:.3f} before, {other.auroc:.3f} with as many other words "
        "replaced. A replaced word may be what made its prompt positive, so a fall is no proof of reading words"
    )
    judged = finding.judged("above", margin=MARGIN, no_effect=0.5)
    return [replace(judged, note=note), _replacement_works(measured, bag, words)], found


def _telling(measured: Measured, bag: BagOfWords) -> tuple[str, ...]:
    """The words that a bag of words goes by: fifty, and twice as many until it loses half of what it had."""
    prompts, n = measured.examples.prompts, KEYWORDS
    before = measured.rank(bag.scores(prompts)).value(AUROC)
    while True:
        words = keywords_of(bag, n)
        left = measured.rank(bag.scores(_without(prompts, words, bag))).value(AUROC)
        if len(words) < n or left - 0.5 <= (before - 0.5) / 2:
            return words
        n *= 2


def _replacement_works(measured: Measured, bag: BagOfWords, words: Sequence[str]) -> Finding:
    """A check of the control itself: a bag of words must fall, where it had something to go by."""
    prompts = measured.examples.prompts
    then, now = measured.rank(bag.scores(prompts)), measured.rank(bag.scores(_without(prompts, words, bag)))
    fall, spread = then.above(now, AUROC)
    note = f"its AUROC is {then.value(AUROC):.3f} before and {now.value(AUROC):.3f} after"
    name, claim = "control.keyword_masked.bag_of_words", "the replacement takes from a bag of words what it goes by"
    finding = Finding(name, claim, fall, spread, Interval(0.0, 0.0, of="no fall"), len(prompts), note=note)
    if then.interval(AUROC).low <= 0.5 + MARGIN:
        return replace(finding, verdict="not tested", note=f"{note}: words alone tell little here")
    return replace(finding.judged("above", margin=MARGIN), note=note)


def _masked(measured: Measured, bag: BagOfWords, name: str, words: Sequence[str]) -> Control:
    prompts = _without(measured.examples.prompts, words, bag)
    ranked = measured.rank(measured.guard.decision_function(prompts))
    score = measured.rank(bag.scores(prompts)).value(AUROC)
    shown = ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")
    note = f"replaced: {shown}"
    return Control(f"{name} replaced", ranked.value(AUROC), ranked.interval(AUROC), score, len(prompts), note)


def _without(prompts: Sequence[Prompt], words: Sequence[str], bag: BagOfWords) -> list[Prompt]:
    swaps = stand_ins(words, bag)
    return [replaced(prompt, swaps) for prompt in prompts]


def length_control(measured: Measured, bag: BagOfWords | None) -> tuple[list[Finding], list[Control]]:
    """AUROC of length alone, and of the guard on prompts matched in length: as many positives as negatives of each."""
    lengths = measured.guard.model.tokens(measured.examples.prompts).lengths.numpy()
    alone = measured.rank(lengths.astype(np.float64))
    value, spread, n = alone.value(AUROC), alone.interval(AUROC), len(lengths)
    claim = "length in tokens does not tell the classes apart"
    verdict = judge_absence(spread, margin=2 * MARGIN, no_effect=0.5)
    findings = [Finding("control.length", claim, value, spread, CHANCE, n, verdict)]
    controls = [Control("length alone", value, spread, NONE, n, "the number of tokens as the score")]
    kept = matched(lengths, measured.y, seed=measured.seed)
    claim = "the guard tells apart prompts of equal length"
    if len(kept) < FEW:
        note = f"only {len(kept) // 2} pairs of a positive and a negative prompt are of equal length"
        return [*findings, Finding("control.length_matched", claim, NONE, verdict="not tested", note=note)], controls
    mask = np.zeros(n, dtype=bool)
    mask[kept] = True
    ranked = measured.ranked.where(mask)
    value, spread = ranked.value(AUROC), ranked.interval(AUROC)
    left = alone.where(mask).value(AUROC)
    note = f"{len(kept) // 2} pairs within about {100 * NEAR:g} % of each other; length alone has {left:.3f} there"
    finding = Finding("control.length_matched", claim, value, spread, CHANCE, len(kept))
    findings.append(replace(finding.judged("above", margin=MARGIN, no_effect=0.5), note=note))
    score = NONE if bag is None else measured.rank(bag.scores(measured.examples.prompts)).where(mask).value(AUROC)
    return findings, [*controls, Control("equal lengths", value, spread, score, len(kept), note)]


def matched(lengths: Int[np.ndarray, " n"], y: np.ndarray, *, seed: int) -> Int[np.ndarray, " kept"]:
    """Rows of as many positives as negatives in every bin of length; bins of equal ratio, one token wide at least."""
    bins = np.unique(np.round(np.log(lengths) / np.log1p(NEAR)), return_inverse=True)[1]
    rng, kept = np.random.default_rng(seed), list[int]()
    for number in range(int(bins.max()) + 1):
        sides = [np.flatnonzero((bins == number) & (y == side)) for side in (False, True)]
        fewest = min(map(len, sides))
        for side in sides:
            kept += rng.choice(side, fewest, replace=False).tolist()
    return np.array(sorted(kept), dtype=np.int64)


def template_control(measured: Measured, bag: BagOfWords | None) -> tuple[list[Finding], list[Control]]:
    """The same prompts in other surroundings, read where the guard's position rule still means something.

    Wrapped: the last turn inside "Question: ...", read by the same rule; the instruction stays what it was. Raw, for
    guards that read the last token of the instruction behind a chat template: the turn up to the end of its instruction
    as bare text, without system prompt or template, read at its last token, which is the same word.
    """
    guard, prompts = measured.guard, measured.examples.prompts
    variants = {"wrapped": ([asking(prompt, WRAPPER) for prompt in prompts], guard.where, f"inside {WRAPPER!r}")}
    if guard.where == T_INST and guard.model.chats:
        variants["raw"] = ([bare(prompt) for prompt in prompts], LAST, "instruction as bare text, its last token read")
    findings: list[Finding] = []
    controls: list[Control] = []
    for name, (changed, where, about) in variants.items():
        reader = copy(guard)
        reader.where = where
        scores = reader.decision_function(changed)
        ranked = measured.rank(scores)
        value, spread = ranked.value(AUROC), ranked.interval(AUROC)
        score = NONE if bag is None else measured.rank(bag.scores(changed)).value(AUROC)
        controls.append(Control(f"template: {name}", value, spread, score, len(changed), about))
        loss, apart = measured.ranked.above(ranked, AUROC)
        flagged = scores > guard.boundary
        verdict = (
            "unaudited" if apart.low != apart.low
            else "supported" if apart.high <= MARGIN else "refuted" if apart.low > MARGIN else "inconclusive"
        )  # fmt: skip
        note = (
            f"{about}: AUROC {value:.3f}; at the threshold {float(flagged[measured.y].mean()):.3f} of positives and "
            f"{float(flagged[~measured.y].mean()):.3f} of negatives are flagged"
        )
        claim = f"in another template ({name}) the guard loses less than {MARGIN:g} of its AUROC"
        findings.append(Finding(f"control.template_{name}", claim, loss, apart, None, len(changed), verdict, note=note))
    return findings, controls


def bare(prompt: Prompt) -> Prompt:
    """The last turn up to the end of its instruction, as text that no template is put around."""
    source = prompt.shown
    instruction = source if prompt.instruction is None else prompt.instruction
    start = source.find(instruction) if prompt.start is None else source.find(instruction, prompt.start)
    return Prompt(text=source[: start + len(instruction)].rstrip(), raw=True)


def controls_table(controls: Sequence[Control], measured: Measured) -> Table:
    """The guard's AUROC under every control."""
    before = measured.ranked.value(AUROC)
    spread = measured.ranked.interval(AUROC)
    rows = [Control("as given", before, spread, NONE, len(measured.y), "the prompts as they are"), *controls]
    return Table.of(
        [
            {
                "control": row.name,
                "auroc": row.auroc,
                "low": row.interval.low,
                "high": row.interval.high,
                "bag_of_words": row.bag,
                "n": row.n,
                "note": row.note,
            }
            for row in rows
        ],
        "AUROC of the guard on the same prompts after each change, and that of a bag of words where it was asked.",
    )
