"""A guard on labelled prompts that it was not made from: what everything in its report is computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float64, Int

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, unknown
from subspace_probe.guard.classifier import GuardClassifier, Labels
from subspace_probe.guard.examples import Examples, Groups, Shown, examples_of
from subspace_probe.guard.group_draws import GroupDraws
from subspace_probe.guard.ranked import Ranked


@final
@dataclass(frozen=True, eq=False)
class Slice:
    """The prompts with one value of a factor.

    Attributes:
        name: `framing.1`, as findings are called.
        mask: which prompts, shape [n].
    """

    name: str
    mask: Bool[np.ndarray, " n"]

    @property
    def label(self) -> str:
        """As tables show it."""
        return " = ".join(self.name.rsplit(".", 1))


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Prompts and what a guard says of them.

    Attributes:
        rows: what its probe reads, shape [n, n_features].
        scores: its decisions, shape [n].
        probabilities: of the positive class, shape [n].
        flagged: which prompts lie above its threshold, or above its probe's own boundary, shape [n].
        abstained: which are not flagged, but unlike what its gate knows, shape [n].
        factors: of the prompts, by name, shape [n] each; none where they came as a list.
    """

    guard: GuardClassifier
    examples: Examples
    rows: Float64[np.ndarray, "n f"]
    scores: Float64[np.ndarray, " n"]
    probabilities: Float64[np.ndarray, " n"]
    flagged: Bool[np.ndarray, " n"]
    abstained: Bool[np.ndarray, " n"]
    factors: Mapping[str, Int[np.ndarray, " n"]]
    name: str
    prompts: GroupDraws

    @classmethod
    def of(
        cls, guard: GuardClassifier, X: Shown, y: Labels | None, groups: Groups | None, *, draws: int, seed: int
    ) -> "Measured":
        """Read the prompts.

        Raises:
            DataError: prompts that the guard was made from, or of one class only.
        """
        guard.require_unseen(X, "report")
        examples = examples_of(X, y, groups=groups)
        contrast = contrast_of(X)
        labels, rows = examples.labels.astype(bool), guard.states(X)
        judged = guard.judge_rows(rows)
        return cls(
            guard,
            examples,
            rows,
            np.array([one.score for one in judged]),
            np.array([one.probability for one in judged]),
            np.array([one.flagged for one in judged]),
            np.array([one.abstained for one in judged]),
            {} if contrast is None else {name: np.asarray(column) for name, column in contrast.factors.items()},
            "prompts" if contrast is None else contrast.name,
            GroupDraws(labels, examples.groups, draws, seed),
        )

    @property
    def y(self) -> Bool[np.ndarray, " n"]:
        """Whether each prompt is positive."""
        return self.prompts.y

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.prompts.seed

    @property
    def ranked(self) -> Ranked:
        """Its scores."""
        return self.rank(self.scores)

    def rank(self, scores: Float64[np.ndarray, " n"]) -> Ranked:
        """Other scores of the same prompts."""
        return Ranked(scores, self.prompts)

    def slices(self, factors: Sequence[str]) -> list[Slice]:
        """The prompts by the values of each of these factors.

        Raises:
            UnknownName: no such factor.
            ConfigError: prompts without factors.
        """
        if factors and not self.factors:
            raise ConfigError(
                f"Slices by {', '.join(factors)} were asked for, but the prompts have no factors. Give a Contrast."
            )
        for factor in factors:
            if factor not in self.factors:
                raise unknown("factor", factor, self.factors)
        return [
            Slice(f"{factor}.{value}", self.factors[factor] == value)
            for factor in factors
            for value in np.unique(self.factors[factor])
        ]

    def require_apart(self, other: Examples, what: str) -> None:
        """Check that none of these prompts is among others.

        Raises:
            DataError: some are.
        """
        known = set(other.keys())
        again = [row for row, key in enumerate(self.examples.keys()) if key in known]
        if again:
            raise DataError(
                f"{len(again)} of {len(self.y)} prompts given to report are also in {what} (the first is prompt "
                f"{again[0]}), so baselines would be measured on what they were fitted on. Give disjoint parts; "
                "Contrast.split makes them."
            )


def contrast_of(X: Shown) -> Contrast | None:
    """The contrast behind what was given, where there is one."""
    return X if isinstance(X, Contrast) else X.contrast if isinstance(X, Activations) else None
