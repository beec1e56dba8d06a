"""One audited number: the estimate, its interval, what the control gives, and a verdict."""

from dataclasses import dataclass, replace
from typing import Literal, final

Verdict = Literal["supported", "refuted", "inconclusive", "not tested", "unaudited"]
LEVEL = 0.95
"""What the range of a null must hold for a verdict to rest on it."""
Direction = Literal["above", "below", "beyond"]


@final
@dataclass(frozen=True)
class Interval:
    """A range that holds `level` of something: of the estimate's uncertainty, or of a null distribution.

    Attributes:
        of: what was resampled or drawn, in words: "prompts, bootstrap", "100 random directions".
    """

    low: float
    high: float
    level: float = 0.95
    of: str = ""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@final
@dataclass(frozen=True)
class Expectation:
    """What a study expects of a finding; unmet ones are shown, not hidden."""

    above: float | None = None
    below: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value is where it is expected."""
        return (self.above is None or value >= self.above) and (self.below is None or value <= self.below)

    def __str__(self) -> str:
        parts = [
            f">= {self.above:g}" if self.above is not None else "",
            f"<= {self.below:g}" if self.below is not None else "",
        ]
        return " and ".join(part for part in parts if part)


@final
@dataclass(frozen=True)
class Finding:
    """A number with what is needed to trust it.

    Attributes:
        name: dotted, stable: `refusal_rate.ablated`. Audits end in `control.*` and `mechanism.*`.
        claim: the sentence the verdict is about.
        estimate: the number; NaN where it could not be computed.
        interval: uncertainty of the estimate.
        null: the same statistic under the control.
        n: prompts behind it.
        verdict: "unaudited" until a control says otherwise.
        expected: what the study expects, where it expects something.
        note: one sentence of reading, or the reason why it was not tested.
    """

    name: str
    claim: str
    estimate: float
    interval: Interval | None = None
    null: Interval | None = None
    n: int = 0
    verdict: Verdict = "unaudited"
    expected: Expectation | None = None
    note: str = ""

    def judged(self, direction: Direction, *, margin: float, no_effect: float = 0.0) -> "Finding":
        """The finding with its verdict, from its own interval and null; see `judge`."""
        verdict = judge(self.interval, self.null, direction, margin=margin, no_effect=no_effect)
        return replace(self, verdict=verdict)

    @property
    def met(self) -> bool:
        """Whether the expectation holds; True where there is none."""
        return self.expected is None or self.expected.met(self.estimate)


def judge(
    interval: Interval | None, null: Interval | None, direction: Direction, *, margin: float, no_effect: float = 0.0
) -> Verdict:
    """The verdict that an interval and a null allow.

    *refuted*: the interval lies inside `margin` around no effect, or entirely against the claim;
    *supported*: it lies outside the null's range in the claimed direction; *inconclusive*: neither;
    *unaudited*: there is no interval or no null to judge by, or one of too few draws.

    Args:
        interval: uncertainty of the estimate.
        null: the range of the same statistic under the control.
        direction: the claim: the effect is above the null, below it, or beyond it: on its own side of no effect,
            larger than any that the null has there.
        margin: half-width of what counts as no effect, stated beforehand.
        no_effect: the value of no effect.
    """
    if interval is None or null is None or any(v != v for v in (interval.low, interval.high, null.low, null.high)):
        return "unaudited"
    if abs(interval.low - no_effect) <= margin and abs(interval.high - no_effect) <= margin:
        return "refuted"
    above, below = interval.low > null.high, interval.high < null.low
    beyond = (above and interval.low > no_effect) or (below and interval.high < no_effect)
    claimed = {"above": above, "below": below, "beyond": beyond}[direction]
    against = {"above": interval.high < no_effect - margin, "below": interval.low > no_effect + margin, "beyond": False}
    if claimed:
        return "supported" if null.level >= LEVEL else "unaudited"
    return "refuted" if against[direction] else "inconclusive"


def judge_absence(interval: Interval | None, *, margin: float, no_effect: float = 0.0) -> Verdict:
    """The verdict on a claim that something does *not* happen.

    *supported*: the whole interval lies within `margin` of no effect; *refuted*: it lies outside; else *inconclusive*.
    A small p-value would show neither.
    """
    if interval is None or interval.low != interval.low:
        return "unaudited"
    low, high = interval.low - no_effect, interval.high - no_effect
    if -margin <= low and high <= margin:
        return "supported"
    return "refuted" if low > margin or high < -margin else "inconclusive"
