"""The measurements of the study of illusions: exchanges at one site, the heads that fetch the name, and what they ask.

FLDD is normalised by the clean margin of the base's own answer, not by the partners' difference: a whole exchange of
all that matters gives about 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding, Interval, judge_absence
from subspace_probe.core.intervals import mean_of, range_of, shares
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.diagnostics.natural import Natural
from subspace_probe.diagnostics.read_space import ReadSpace, weight_read_space
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.linalg.bases import random_subspace
from subspace_probe.linalg.illusions import split_by_row_space
from subspace_probe.metrics import metric_for
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms.gadgets import Gadget
from subspace_probe.studies.patching_illusion_heads import Movers

PARTS = ("", ", read part", ", unread part")
"""A direction, the part of it that is read, and the rest, both of unit length."""
NOTHING = 0.1
"""Half-width of "no effect", in units of FLDD: stated beforehand, as published (the MLP's -8 % counts as none)."""


@final
@dataclass(frozen=True, eq=False)
class Effects:
    """What exchanges at one site do.

    Attributes:
        site: where.
        fldd: share of the clean margin that is lost, by what was exchanged; per prompt, such that the mean is the ratio
            of means.
        hits: whether the partner's answer is the likeliest token.
        floor: the same where nothing is exchanged.
        random: FLDD of random directions, shape [draws, n].
        groups: of the prompts.
        reader: what reads the site, and the share of each direction that it sees.
    """

    site: Site
    fldd: Mapping[str, Float[Tensor, " n"]]
    hits: Mapping[str, Bool[Tensor, " n"]]
    floor: Bool[Tensor, " n"]
    random: Float[Tensor, "draws n"]
    groups: tuple[int, ...]
    reader: str
    visible: Mapping[str, float]
    seed: int

    @property
    def null(self) -> Interval:
        """FLDD of random directions."""
        return range_of(self.random.mean(1), f"{len(self.random)} random directions")

    def effect(self, name: str, what: str, *, expected: Expectation | None = None) -> Finding:
        """FLDD of an exchange, against random directions."""
        estimate, interval = mean_of(self.fldd[what], self.groups, seed=self.seed)
        claim = f"exchanging {what} at {self.site.short} moves the answer's margin, beyond random directions"
        hits = float(self.hits[what].double().mean())
        note = f"interchange accuracy {hits:.3f}, of nothing exchanged {float(self.floor.double().mean()):.3f}"
        found = Finding(name, claim, estimate, interval, self.null, len(self.groups), expected=expected, note=note)
        return found.judged("above", margin=NOTHING)

    def accuracy(self, name: str, what: str, *, expected: Expectation | None = None) -> Finding:
        """Interchange accuracy over the whole vocabulary, against the floor of exchanging nothing."""
        estimate, interval = mean_of(self.hits[what].double(), self.groups, seed=self.seed)
        _, null = mean_of(self.floor.double(), self.groups, seed=self.seed)
        claim = f"exchanging {what} at {self.site.short} makes prompts answer as their partner"
        null = replace(null, of="nothing exchanged")
        found = Finding(name, claim, estimate, interval, null, len(self.groups), expected=expected)
        return found.judged("above", margin=NOTHING)

    def absence(self, name: str, what: str, *, expected: Expectation | None = None) -> Finding:
        """FLDD of an exchange that is said to do nothing."""
        estimate, interval = mean_of(self.fldd[what], self.groups, seed=self.seed)
        claim = f"exchanging {what} at {self.site.short} does nothing to the answer's margin"
        found = Finding(name, claim, estimate, interval, self.null, len(self.groups), expected=expected)
        note = f"interchange accuracy {float(self.hits[what].double().mean()):.3f}"
        return replace(found, verdict=judge_absence(interval, margin=NOTHING), note=note)

    def retention(self, name: str, direction: str, part: str, claim: str, *, least: float | None = None,
                  most: float | None = None, known: bool) -> Finding:  # fmt: skip
        """FLDD of a part as a share of that of the direction; supported where the interval lies beyond the bound."""
        whole, own = self.fldd[direction], self.fldd[direction + part]
        n, share = len(self.groups), self.visible[direction]
        if mean_of(whole, self.groups, seed=self.seed)[1].low <= NOTHING:
            note = "the direction has no effect that could be split"
            return Finding(name, claim, float("nan"), n=n, verdict="not tested", note=note)
        estimate, interval = mean_of(shares(own, whole), self.groups, seed=self.seed)
        null = range_of(self.random.mean(1) / whole.mean(), f"{len(self.random)} random directions")
        holds = interval.low >= least if least is not None else interval.high <= (most or 0.0)
        fails = interval.high < least if least is not None else interval.low > (most or 0.0)
        hits = float(self.hits[direction + part].double().mean()), float(self.hits[direction].double().mean())
        note = f"interchange accuracy {hits[0]:.3f} of {hits[1]:.3f}; {share:.2f} of the direction is read by "
        note += self.reader
        verdict = "supported" if holds else "refuted" if fails else "inconclusive"
        expected = Expectation(above=least, below=most) if known else None
        return Finding(name, claim, estimate, interval, null, n, verdict, expected, note)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Of the table `effects`."""
        found: list[dict[str, Any]] = []
        for what, lost in self.fldd.items():
            share, spread = mean_of(lost, self.groups, seed=self.seed)
            hits, around = mean_of(self.hits[what].double(), self.groups, seed=self.seed)
            ends = {"low": spread.low, "high": spread.high}
            accuracy = {"iia": hits, "iia_low": around.low, "iia_high": around.high}
            found.append({"site": name, "exchanged": what, "fldd": share, **ends, **accuracy})
        floor = float(self.floor.double().mean())
        empty = {"fldd": 0.0, "low": None, "high": None, "iia": floor, "iia_low": None, "iia_high": None}
        return [{"site": name, "exchanged": "nothing", **empty}, *found]

    def nulls(self, name: str) -> list[dict[str, Any]]:
        """Rows of the null figure."""
        drawn = {"random direction": self.random.mean(1).tolist(), "observed": [float(self.fldd["DAS"].mean())]}
        return [
            {"direction": name, "behaviour": "FLDD", "kind": kind, "value": value}
            for kind, values in drawn.items()
            for value in values
        ]


@final
class Bench:
    """Held-out pairs at one site.

    Args:
        draws: random directions.
        seed: of the draws and bootstraps.
    """

    def __init__(self, model: HookedModel, test: Contrast, site: Site, where: Where, draws: int, seed: int) -> None:
        self.model, self.draws, self.seed = model, draws, seed
        self.pairs = Natural(model, test, site, where, metric_for("logit_difference", model), pairs=len(test))
        if len(self.pairs.base) != len(self.pairs):
            raise ConfigError(f"{where} means several tokens a prompt. Give one token, such as last.")
        answers = {(p.answer, p.foil) for p in self.pairs.prompts.prompts}
        if any(not answer or not foil or answer == foil for answer, foil in answers):
            raise ConfigError(f"Partners in {test.name!r} answer alike. Give pairs whose prompts differ in the answer.")

    @property
    def read_space(self) -> ReadSpace:
        """Of the MLP: what its output matrix sees."""
        return weight_read_space(self.model.backend, self.pairs.site)

    def outcomes(self, moves: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Margin of the base's own answer, whether the partner's answer is likeliest, and the base's: [move, n]."""
        pairs = self.pairs
        conditions = [None if move is None else pairs.moved(move) for move in moves]
        accuracy = metric_for("accuracy", self.model)

        def other(logits: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return accuracy(logits, [replace(prompt, answer=prompt.foil) for prompt in prompts])

        found = outcomes(self.model, pairs.prompts.prompts, conditions, [pairs.metric, accuracy, other])
        positive = pairs.labels == 1  # the question of both sides is the positive one's
        margin = torch.where(positive, found[0], -found[0])
        return margin, torch.where(positive, found[2], found[1]) > 0, torch.where(positive, found[1], found[2]) > 0

    def effects(self, directions: Mapping[str, Subspace], space: ReadSpace) -> Effects:
        """Of every direction, its parts, the whole state, and random directions."""
        pairs, moves = self.pairs, dict[str, Tensor]()
        for name, direction in directions.items():
            split = split_by_row_space(direction.basis.double().cpu(), space.rows.basis)
            bases = (direction.basis.double().cpu(), split.row, split.null)
            moves |= {name + part: pairs.along(basis) for part, basis in zip(PARTS, bases, strict=True)}
        moves["whole state"] = pairs.difference
        width = pairs.base.shape[1]
        randoms = [
            pairs.along(random_subspace(1, width, seed=s)) for s in range(self.seed + 500, self.seed + 500 + self.draws)
        ]
        margin, hits, _ = self.outcomes([None, *moves.values(), *randoms])
        lost = shares(margin[0] - margin, margin[0])
        visible = {name: split_by_row_space(d.basis.double().cpu(), space.rows.basis).visible
                   for name, d in directions.items()}  # fmt: skip
        named = dict(zip(moves, lost[1:], strict=False))
        return Effects(
            pairs.site, named, dict(zip(moves, hits[1:], strict=False)), hits[0], lost[1 + len(moves) :],
            pairs.prompts.groups, f"{space.of} (rank {space.rank} of {width})", visible, self.seed,
        )  # fmt: skip


def before(bench: Bench, known: bool) -> list[Finding]:
    """What the model does by itself."""
    margin, hits, right = bench.outcomes([None])
    groups, n = bench.pairs.prompts.groups, len(bench.pairs)
    rate, spread = mean_of(right[0].double(), groups, seed=bench.seed)
    floor, around = mean_of(hits[0].double(), groups, seed=bench.seed)
    mean, of_margin = mean_of(margin[0], groups, seed=bench.seed)
    chance = Interval(0.5, 0.5, of="either of the two names")
    task = Finding("task.accuracy", "the model names the right one of the two", rate, spread, chance, n,
                   expected=Expectation(above=0.95) if known else None)  # fmt: skip
    return [
        task.judged("above", margin=NOTHING),
        Finding("task.margin", "the right name leads", mean, of_margin, Interval(0.0, 0.0, of="no preference"), n)
        .judged("above", margin=0.1),
        Finding("task.floor", "with nothing exchanged, prompts do not answer as their partner", floor, around, None, n,
                judge_absence(around, margin=NOTHING), Expectation(below=0.05) if known else None),
    ]  # fmt: skip


def gadget_finding(gadget: Gadget | None) -> list[Finding]:
    """That what was planted leaves the model as it was."""
    if gadget is None:
        return []
    claim = "the neurons planted in the MLP leave the model's answers as they were"
    note = f"{gadget.neurons} neurons; mean KL in nats, largest change of a logit {gadget.change:.2g}"
    return [Finding("gadget.kl", claim, gadget.kl, None, None, 64, "supported" if gadget.kl <= 1e-3 else "refuted",
                    Expectation(below=1e-3), note)]  # fmt: skip


# ---------------------------------------------------------------------------------------------- who fetches the name
# --------------------------------------------------------------------------------------------------------- findings
def mlp_findings(effects: Effects, known: bool) -> list[Finding]:
    """Of the MLP: the direction acts, its read part does not, and the whole does nothing."""
    some = Expectation(above=0.2) if known else None
    planted = ["mlp.planted.fldd"] if "planted" in effects.fldd else []
    none = Expectation(above=-NOTHING, below=NOTHING) if known else None
    return [
        effects.effect("mlp.das.fldd", "DAS", expected=some),
        effects.accuracy("mlp.das.iia", "DAS"),
        effects.retention("mlp.das.read_part", "DAS", PARTS[1], "the part that the MLP's output matrix reads does not "
                          "act by itself", most=0.4, known=known),
        effects.retention("mlp.das.unread_part", "DAS", PARTS[2], "the part that the output matrix does not read does "
                          "nothing by itself", most=0.05, known=known),
        effects.absence("mlp.component.fldd", "whole state", expected=none),
        effects.effect("mlp.mean_difference.fldd", "mean difference"),
        effects.effect("mlp.gradient.fldd", "gradient"),
        *(effects.effect(name, "planted", expected=Expectation(above=1.0)) for name in planted),
    ]  # fmt: skip


def stream_findings(effects: Effects, known: bool) -> list[Finding]:
    """Of the stream: every direction acts, and through what the heads ask by."""
    some = Expectation(above=1.0) if known else None
    findings = [
        effects.effect("residual.das.fldd", "DAS", expected=some),
        effects.accuracy("residual.das.iia", "DAS"),
        effects.effect("residual.component.fldd", "whole state", expected=some),
        effects.accuracy("residual.component.iia", "whole state"),
    ]
    for direction in ("DAS", "mean difference", "gradient"):
        name = f"residual.{direction.lower().replace(' ', '_')}"
        bound = known and direction == "DAS"
        findings += [effects.effect(f"{name}.fldd", direction)] if direction != "DAS" else []
        findings += [
            effects.retention(f"{name}.read_part", direction, PARTS[1], "the part that the named heads' queries read "
                              "keeps the effect", least=0.85, known=bound),
            effects.retention(f"{name}.unread_part", direction, PARTS[2], "the rest of the direction does little",
                              most=0.2, known=bound),
        ]  # fmt: skip
    return findings


def summary(model: str, findings: Sequence[Finding], movers: Movers) -> list[str]:
    """The answer in a few sentences, each from the findings it names."""
    by_name = {finding.name: finding for finding in findings}

    def figure(name: str) -> str:
        found = by_name.get(name)
        if found is None or found.estimate != found.estimate:
            return "not tested"
        interval = f" [{found.interval.low:z.2f}, {found.interval.high:z.2f}]" if found.interval else ""
        return f"{found.estimate:z.2f}{interval}"

    lines = [
        f"{model} names the right one of two people on {figure('task.accuracy')} of held-out prompts. The heads "
        f"{', '.join(site.short for site in movers.named) or 'none'} carry {figure('heads.share')} of the difference "
        "to the logits, past all other heads.",
        f"In the MLP, a direction found by DAS takes {figure('mlp.das.fldd')} of the margin away and turns "
        f"{figure('mlp.das.iia')} of the answers; the part of it that is read keeps {figure('mlp.das.read_part')} of "
        f"that, and exchanging the whole MLP takes away {figure('mlp.component.fldd')}. Mechanism: "
        f"{by_name['mlp.mechanism'].verdict}.",
        f"In the residual stream DAS takes {figure('residual.das.fldd')} of the margin away and turns "
        f"{figure('residual.das.iia')} of the answers; the part that the named heads ask by keeps "
        f"{figure('residual.das.read_part')} of that, the rest {figure('residual.das.unread_part')}. Mechanism: "
        f"{by_name['residual.mechanism'].verdict}.",
    ]
    if by_name["facts.edit_difference"].verdict != "not tested":
        lines.append(
            "Facts: " + by_name["facts.edit_difference"].note + ". Directions fitted to a single pair are judged on "
            "that pair, so they say nothing about the mechanism of recall."
        )
    return lines
