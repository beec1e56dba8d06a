"""What others ask of a guard, so that they need neither a model nor a classifier to be written and tested."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from subspace_probe.guard.examples import Item
from subspace_probe.guard.judgements import Judgement, TokenScores


@runtime_checkable
class Judge(Protocol):
    """What can stand behind a server: a fitted guard, or anything that answers like one."""

    def judge(self, X: Sequence[Item], /) -> list[Judgement]:
        """One judgement a prompt, in order."""
        ...

    def token_scores(self, prompt: str, /) -> TokenScores:
        """The score at every token of one prompt."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the guard is, in plain values: model, method, layers, where, category, threshold, calibrated."""
        ...
