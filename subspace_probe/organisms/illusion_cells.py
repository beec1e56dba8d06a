"""Where illusions and faithful directions are made: which organism, prompts, token and block, in two disjoint sets.

Margins are set on one set of organisms and figures reported on the other. The two share no organism, hence no weights,
no site and no gadget; and their prompts come from different contrasts, or from other wordings of the same language.
Which cells a table lists was found by running the certificates on every one; they are run again on every case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple, final

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.tokens import LAST, T_INST, Where
from subspace_probe.models import load_model
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import language_of, organism_contrast, organism_path
from subspace_probe.organisms.exchanging import Exchange

N_TRAIN: Final = 192
N_TEST: Final = 64


@final
class Cell(NamedTuple):
    """One place: prompts of an organism, a token, a block."""

    organism: str
    contrast: str
    where: Where
    layer: int

    def __str__(self) -> str:
        return f"{self.organism}/{self.contrast}, {self.where}, block {self.layer}"


def _cells(organism: str, contrast: str, where: Where, *layers: int) -> tuple[Cell, ...]:
    return tuple(Cell(organism, contrast, where, layer) for layer in layers)


HOSTS: Final[dict[bool, tuple[Cell, ...]]] = {
    False: (
        *_cells("chat", "judgement", LAST, 2, 3),
        *_cells("chat", "judgement", T_INST, 2),
        *_cells("chat", "knob", LAST, 2),
        *_cells("chat-natural", "harmfulness", LAST, 2, 3),
        *_cells("chat-natural", "judgement", LAST, 2, 3),
        *_cells("chat-natural", "refused", LAST, 2, 3),
    ),
    True: (
        *_cells("chat-base", "judgement", LAST, 2, 3),
        *_cells("chat-base", "knob", LAST, 2),
        *_cells("override", "requests", LAST, 2),
        *_cells("override", "sides", LAST, 1, 2, 3),
        *_cells("override-1", "sides", LAST, 1, 2, 3),
        *_cells("robust-1", "sides", LAST, 2, 3),
    ),
}
"""MLPs whose whole output at the token changes no answer, while the residual stream behind them carries the variable:
what an illusion needs (reported, and for calibration)."""

SILENT: Final[dict[bool, tuple[Cell, ...]]] = {
    False: (*_cells("chat", "knob", LAST, 1), *_cells("chat-natural", "harmfulness", LAST, 1)),
    True: _cells("chat-base", "knob", LAST, 1),
}
"""Residual states from which the variable can be read, and which are not used for the answer yet."""

CARRIERS: Final[dict[bool, tuple[Cell, ...]]] = {
    False: (
        *_cells("chat", "harmfulness", T_INST, 1),
        *_cells("chat", "harmfulness", LAST, 2, 3),
        *_cells("chat", "judgement", T_INST, 1),
        *_cells("chat", "judgement", LAST, 3),
        *_cells("chat", "knob", LAST, 2),
        *_cells("chat", "refused", LAST, 2, 3),
        *_cells("chat-natural", "harmfulness", T_INST, 0, 1),
        *_cells("chat-natural", "harmfulness", LAST, 2, 3),
        *_cells("chat-natural", "judgement", LAST, 1, 2, 3),
        *_cells("chat-natural", "refused", LAST, 2, 3),
    ),
    True: (
        *_cells("chat-base", "judgement", T_INST, 1),
        *_cells("chat-base", "judgement", LAST, 2, 3),
        *_cells("chat-base", "knob", LAST, 2),
        *_cells("override", "requests", LAST, 1, 2, 3),
        *_cells("override", "sides", LAST, 2, 3),
        *_cells("override-1", "sides", LAST, 1, 2, 3),
        *_cells("robust-1", "sides", LAST, 2, 3),
    ),
}
"""Residual states that carry the variable: exchanging them whole changes the answers."""

PARTIAL: Final[dict[bool, tuple[Cell, ...]]] = {
    False: (
        *_cells("chat", "harmfulness", LAST, 2),
        *_cells("chat", "refused", LAST, 2),
        *_cells("chat-natural", "harmfulness", T_INST, 1),
        *_cells("chat-natural", "judgement", LAST, 1),
        *_cells("chat-natural", "refused", LAST, 0),
    ),
    True: (
        *_cells("override", "requests", LAST, 1),
        *_cells("override-1", "requests", LAST, 1, 2, 3),
        *_cells("robust-1", "requests", LAST, 1, 2),
    ),
}
"""MLPs as they were trained that change some of the answers when exchanged whole, but not most."""


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """The model and the prompts of a cell."""

    cell: Cell
    model: HookedModel

    @cached_property
    def train(self) -> Contrast:
        """What directions and gadgets are fitted on."""
        return cell_contrast(self.cell.organism, self.cell.contrast, split="train", n=N_TRAIN, seed=1)

    @cached_property
    def test(self) -> Contrast:
        """Held-out minimal pairs: no verb-object pair, note or body of theirs is in `train`."""
        return cell_contrast(self.cell.organism, self.cell.contrast, split="test", n=N_TEST, seed=0)

    @cached_property
    def fitted(self) -> Exchange:
        """The train prompts, run."""
        return Exchange(self.model, self.train, self.cell.where)

    @cached_property
    def held(self) -> Exchange:
        """The test prompts, run in the organism as it is."""
        return Exchange(self.model, self.test, self.cell.where)


def benches(cells: Sequence[Cell], *, rounds: int = 1) -> Iterator[tuple[int, Bench]]:
    """Every cell in each of some rounds, with the number of the round; cells that share prompts share their passes."""
    models: dict[str, HookedModel] = {}
    shared: dict[tuple[str, str, Where], Bench] = {}
    for number in range(rounds):
        for cell in cells:
            if cell.organism not in models:
                models[cell.organism] = load_model(organism_path(cell.organism)).named(f"organism:{cell.organism}")
            first = shared.setdefault(cell[:3], Bench(cell, models[cell.organism]))
            bench = replace(first, cell=cell)
            for name in ("train", "test", "fitted", "held"):
                bench.__dict__[name] = getattr(first, name)
            yield number, bench


def cell_contrast(organism: str, contrast: str, *, split: str, n: int, seed: int) -> Contrast:
    """Minimal pairs of an organism's language, at most one pair of each group.

    Beside the organism's own contrasts there is "refused": requests of the same verb and object in two framings, one
    of which is refused. Its label is not that of harmfulness: harmful and refused against harmful and complied with
    (a jailbreak framing), harmless and refused (a strict framing) against harmless and complied with, in turn.
    """
    if language_of(organism) == "guarding" or contrast not in ("judgement", "refused"):
        return organism_contrast(f"{organism}/{contrast}", split=split, n=n, seed=seed)
    whole = organism_contrast(
        f"{organism}/{'requests' if contrast == 'refused' else contrast}", split=split, n=3 * n, seed=seed
    )
    rows: dict[tuple[int, int, int], int] = {}
    for row, key in enumerate(zip(whole.groups, whole.labels, whole.factors["framing"], strict=True)):
        rows[key] = row
    kept: list[int] = []
    for turn, group in enumerate(dict.fromkeys(whole.groups)):
        if contrast == "judgement":
            kept += [rows[group, label, turn % 3] for label in (0, 1)]
        else:
            harmful = turn % 2
            kept += [rows[group, harmful, framing] for framing in (0, 1 if harmful else 2)]
    if contrast == "judgement":
        return whole.take(kept)
    chosen = whole.take(kept).relabel("refused")
    return replace(chosen, name=f"{organism}/refused", pairs=chosen.groups)
