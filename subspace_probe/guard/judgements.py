"""What a guard says."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Judgement:
    """What a guard says of one prompt.

    Attributes:
        score: the probe's; a threshold is on it.
        probability: of the positive class; calibrated where the guard is.
        flagged: the score lies above the threshold, or above the probe's own boundary where none is set.
        abstained: not flagged, but the state is unlike the benign states the guard knows, so that not being flagged
            says little.
        threshold: what the score was compared with.
    """

    score: float
    probability: float
    flagged: bool
    abstained: bool
    threshold: float


@final
@dataclass(frozen=True)
class TokenScores:
    """The score at every token of a prompt, as the model was shown it.

    Attributes:
        text: the rendered prompt.
        spans: first and last character (exclusive) of every token.
        scores: one a token: the probe on that token's state.
        position: the token that decides; -1 where the mean over tokens does.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    position: int
