"""How the scores of tokens become one decision: smoothing, k of the last n, and the running maximum."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from subspace_probe.core.errors import ConfigError
from subspace_probe.guard.probe import LatentProbe
from subspace_probe.guard.thresholds import Threshold


@final
@dataclass(frozen=True, eq=False)
class Streaming:
    """How token scores become a decision.

    Args:
        weight: of the newest score in an exponential mean over tokens; 1: none.
        k, n: trips when k of the last n (smoothed) scores lie above the threshold.
        min_tokens: generated tokens that are scored but cannot trip, at the beginning.
        max_new_tokens: the length that the threshold holds for.
        probe: fitted on generated tokens; None: the guard's own, fitted at its token of prompts.
        threshold: on the running maximum; None before one is set.
        set_for: the rule that the threshold was set under; it holds for no other, and for no longer answers.
    """

    weight: float = 1.0
    k: int = 1
    n: int = 1
    min_tokens: int = 0
    max_new_tokens: int = 64
    probe: LatentProbe | None = None
    threshold: Threshold | None = None
    set_for: tuple[float | int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1 or not 1 <= self.k <= self.n or self.min_tokens < 0 or self.max_new_tokens < 2:
            raise ConfigError(
                f"Streaming was given weight={self.weight}, k={self.k}, n={self.n}, min_tokens={self.min_tokens}, "
                f"max_new_tokens={self.max_new_tokens}. The weight lies in (0, 1], k between 1 and n, and there are "
                "two tokens at least: the last one is in no pass."
            )

    def running(self, scores: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest value so far that k of the last n smoothed scores reach, shape [t]; -inf before there is one.

        It lies above a threshold from the very token on at which k of the last n scores lay above it.
        """
        running = Running(self)
        return np.array([running.add(float(score)) for score in scores])

    @property
    def rule(self) -> tuple[float | int, ...]:
        """What a threshold holds under: smoothing and counts, and the length last."""
        return (self.weight, self.k, self.n, self.min_tokens, self.max_new_tokens)

    def require_rule(self) -> None:
        """Check that the threshold was set under this very rule.

        Raises:
            ConfigError: it was set under another one, or for shorter answers.
        """
        if self.rule[:-1] != self.set_for[:-1] or self.rule[-1] > self.set_for[-1]:
            raise ConfigError(
                f"The threshold was set under weight, k, n, min_tokens, max_new_tokens = {self.set_for}, and "
                f"{self.rule} was asked for. Set it anew: stream_threshold."
            )

    def describe(self) -> dict[str, Any]:
        """Plain values; the probe's numbers are apart."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        held = None if self.threshold is None else asdict(self.threshold)
        return settings | {"probe": None if self.probe is None else self.probe.get_params(), "threshold": held}

    @classmethod
    def of(cls, body: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> "Streaming":
        """What `describe` and the probe's `tensors` gave."""
        probe = None if body["probe"] is None else LatentProbe.from_tensors(body["probe"], dict(tensors))
        held = None if body["threshold"] is None else Threshold(**body["threshold"])
        return cls(**{**body, "probe": probe, "threshold": held, "set_for": tuple(body["set_for"])})


@final
class Running:
    """The running maximum of one answer, a token at a time."""

    def __init__(self, streaming: Streaming) -> None:
        self.streaming = streaming
        self.highest = -math.inf
        self._count = 0
        self._recent: deque[float] = deque(maxlen=streaming.n)

    def add(self, score: float) -> float:
        """Take in the score of the next token."""
        streaming = self.streaming
        before = self._recent[-1] if self._recent else score
        self._recent.append(streaming.weight * score + (1 - streaming.weight) * before)
        self._count += 1
        if len(self._recent) >= streaming.k and self._count > streaming.min_tokens:
            self.highest = max(self.highest, sorted(self._recent)[-streaming.k])
        return self.highest
