"""Projected models of the study `safety_subspaces`: what each does, beside what random subspaces give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.diagnostics.selectivity import Behaviour
from subspace_probe.interventions.update_projection import (
    Frames,
    Kind,
    Part,
    Side,
    as_matrix,
    frames,
    matched_rank,
    project_update,
    rank_at,
    write_projected,
)
from subspace_probe.linalg.modes import Modes, modes
from subspace_probe.models.checkpoints import Checkpoint, rewritten, shared_weights
from subspace_probe.models.hooked import HookedModel

SIDES: tuple[Side, ...] = ("left", "right", "both")
_SEED_STEP = 7919
"""Between the seeds of a draw's weights, so that no two weights share a control."""


@final
@dataclass(frozen=True, eq=False)
class Lineage:
    """The weights of an aligned model and what tuning changed in them.

    Attributes:
        aligned: by name.
        updates: by checkpoint and name: alignment (aligned minus base), useful, harmful, contaminated (minus aligned).
        modes: of every weight's alignment update.
        skipped: names that some checkpoint lacks.
    """

    aligned: Mapping[str, Tensor]
    updates: Mapping[str, Mapping[str, Tensor]]
    modes: Mapping[str, Modes]
    skipped: tuple[str, ...] = ()

    @classmethod
    def read(cls, aligned: Checkpoint, others: Mapping[str, Checkpoint], *, most: float) -> "Lineage":
        """Read checkpoints a weight at a time; differences are taken in float64 and kept in float32.

        Args:
            aligned: the model all others are compared with.
            others: by stage: base, useful, harmful, contaminated.
            most: the largest fraction of modes that will be asked for.
        """
        names = shared_weights(aligned, *others.values())
        found: dict[str, dict[str, Tensor]] = {"alignment" if s == "base" else s: {} for s in others}
        spectra: dict[str, Modes] = {}
        before: dict[str, Tensor] = {}
        for name in names:
            before[name] = aligned.read(name)
            for stage, checkpoint in others.items():
                change = checkpoint.read(name).double() - before[name].double()
                if stage == "base":
                    matrix = as_matrix(-change)
                    if (spectrum := modes(matrix, max(1, round(most * min(matrix.shape))))) is not None:
                        spectra[name] = spectrum
                found["alignment" if stage == "base" else stage][name] = (
                    -change if stage == "base" else change
                ).float()
        missing = {name for c in (aligned, *others.values()) for name in c.shapes} - set(names)
        return cls(before, found, spectra, tuple(sorted(missing)))


@final
@dataclass(frozen=True, eq=False)
class Sweep:
    """Projections of one update: scores of every prompt, and the energy kept.

    Attributes:
        scores: [fraction, n].
        energy: [fraction].
    """

    scores: Float[Tensor, "fraction n"]
    energy: Float[Tensor, " fraction"]


@final
class Projector:
    """Runs projected models on the same prompts.

    Args:
        model: the aligned one; its weights are changed for as long as a projection is measured, and put back.
        lineage: with an alignment update.
        behaviour: of that model.
        fractions: of the smaller side of every weight; 1 takes every mode.
    """

    def __init__(self, model: HookedModel, lineage: Lineage, behaviour: Behaviour, fractions: Sequence[float]) -> None:
        self.model, self.lineage, self.behaviour = model, lineage, behaviour
        self.fractions = tuple(fractions)

    def tuned(self, update: str) -> Float[Tensor, " n"]:
        """Scores with the whole of an update."""
        with rewritten(self.model) as write:
            for name, change in self.lineage.updates[update].items():
                write(name, (self.lineage.aligned[name].double() + change.double()).to(change.dtype))
            return self.behaviour()

    def sweep(self, update: str, side: Side, part: Part, kind: Kind = "top", *, seed: int = 0) -> Sweep:
        """One update projected at every fraction."""
        return self._run(update, side, part, lambda fraction: self._frames(kind, fraction, seed))

    def matched(self, update: str, side: Side, part: Part, *, seed: int) -> Sweep:
        """The same on random subspaces that hold as much of each weight's update as alignment's do."""
        return self._run(update, side, part, lambda fraction: self._energy_matched(update, side, fraction, seed))

    def draws(self, many: int, run: Callable[[int], Sweep], *, name: str, seed: int, progress: bool) -> list[Sweep]:
        """A control, drawn anew each time."""
        bar: Callable[..., Any] = tqdm
        return [run(seed + 1 + draw) for draw in bar(range(many), desc=name, disable=not progress, leave=False)]

    def distance(self, update: str, other: str, kind: Kind) -> float:
        """How far an update without all of alignment's left modes is from another one, in shares of its own length."""
        away = total = 0.0
        for name, change in self.lineage.updates[update].items():
            left = as_matrix(change).double()
            if name in self.lineage.modes:
                m = self.lineage.modes[name]
                left = project_update(left, frames(kind, m, m.rank), side="left", part="orthogonal")
            away += float((left - as_matrix(self.lineage.updates[other][name]).double()).square().sum())
            total += float(change.double().square().sum())
        return (away / total) ** 0.5

    def _run(self, update: str, side: Side, part: Part, onto: Callable[[float], Mapping[str, Frames]]) -> Sweep:
        scores: list[Tensor] = []
        energies: list[float] = []
        lineage = self.lineage
        with rewritten(self.model) as write:
            for fraction in self.fractions:
                kept = write_projected(
                    write, lineage.aligned, lineage.updates[update], onto(fraction), side=side, part=part
                )
                scores.append(self.behaviour())
                energies.append(kept.energy)
        return Sweep(torch.stack(scores), torch.tensor(energies, dtype=torch.float64))

    def _frames(self, kind: Kind, fraction: float, seed: int) -> dict[str, Frames]:
        found = self.lineage.modes.items()
        return {
            name: frames(kind, m, rank_at(fraction, m), seed=seed + _SEED_STEP * row)
            for row, (name, m) in enumerate(found)
        }

    def _energy_matched(self, update: str, side: Side, fraction: float, seed: int) -> dict[str, Frames]:
        found: dict[str, Frames] = {}
        for row, (name, m) in enumerate(self.lineage.modes.items()):
            onto = frames("top", m, rank_at(fraction, m))
            change = as_matrix(self.lineage.updates[update][name]).double()
            inside = onto.left @ change if side != "right" else change
            inside = inside @ onto.right.T if side != "left" else inside
            whole = float(change.square().sum())
            share = float(inside.square().sum()) / whole if whole else 0.0
            rank = matched_rank(share, (change.shape[0], change.shape[1]), side)
            found[name] = frames("random", m, rank, seed=seed + _SEED_STEP * row)
        return found
