"""A guard without a model: its score is a function of the text, so that every answer can be checked against its own."""

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from subspace_probe.core.errors import DataError
from subspace_probe.guard.judgements import Judgement, TokenScores

THRESHOLD = 0.75


def score_of(text: str) -> float:
    """In [0, 1): another text, another score."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def text_that(flagged: bool) -> str:
    """A text that the stub flags, or does not."""
    return next(text for n in range(1000) if (score_of(text := f"text {n}") > THRESHOLD) is flagged)


@dataclass
class StubGuard:
    """Judges by `score_of`; special texts make it fail or wait."""

    category: str = "harmful"
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    hold: threading.Event | None = None
    nan: bool = False

    def judge(self, texts: Sequence[str], /) -> list[Judgement]:
        self.batches.append(len(texts))
        self.threads.add(threading.current_thread().name)
        if self.hold is not None:
            self.hold.wait(30)
        time.sleep(self.seconds)
        for text in texts:
            if text == "too long":
                raise DataError(f"1 prompts are longer than the context; the first is {text!r}.")
            if text == "secret bug":
                raise IndexError(f"no such token in {text!r}")
        scores = [float("nan") if self.nan else score_of(text) for text in texts]
        return [Judgement(s, min(1.0, s) if s == s else 0.5, s > THRESHOLD, s < 0.1, THRESHOLD) for s in scores]

    def token_scores(self, prompt: str, /) -> TokenScores:
        words = prompt.split(" ")
        starts = [sum(len(word) + 1 for word in words[:n]) for n in range(len(words))]
        shown = f"<user>{prompt}<end>"
        spans = [(0, 6), *((6 + s, 6 + s + len(w)) for s, w in zip(starts, words, strict=True))]
        spans.append((len(shown) - 5, len(shown)))
        scores = [score_of(shown[a:b]) for a, b in spans]
        scores[-2] = score_of(prompt)  # the token that decides
        return TokenScores(shown, tuple(spans), tuple(scores), len(spans) - 2)

    def describe(self) -> dict[str, Any]:
        threshold = {"value": THRESHOLD, "target_fpr": 0.01, "confidence": 0.95, "n": 400, "grouped": False}
        threshold |= {"false_positives": 0, "bound": 0.0075}
        return {
            "model": "organism:chat",
            "method": "lda",
            "layers": [3, 4],
            "n_layers": 8,
            "where": "t_inst",
            "category": self.category,
            "threshold": threshold,
            "calibrated": "sigmoid",
        }
