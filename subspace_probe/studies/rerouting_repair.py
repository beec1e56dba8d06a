"""Repair of the study on rerouting: train a copy on what was found, then search the copy with targets of its own."""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Expectation, Finding, judge_absence
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.sites import resid_post
from subspace_probe.core.tokens import LAST, TokenBatch
from subspace_probe.diagnostics.eligibility import targets_of
from subspace_probe.diagnostics.exhaustive import every_choice
from subspace_probe.diagnostics.rungs import observe
from subspace_probe.diagnostics.search_comparison import ANSWER, TARGET, Searches, answer_margin
from subspace_probe.finders.mean_difference import MeanDifference
from subspace_probe.interventions.adversarial_training import AdversarialTraining
from subspace_probe.interventions.objectives import Objective, Reach, free_positions, replaced
from subspace_probe.interventions.token_search import TokenSearch
from subspace_probe.interventions.token_vectors import usable_ids
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.rerouting_prompts import Ground
from subspace_probe.studies.rerouting_tables import logits_with, probed

MARGIN = 0.03
"""Accuracy that may be lost."""
CLEAN = Expectation(above=0.99)
GONE = Expectation(below=0.0)


@runtime_checkable
class Settings(Protocol):
    """What repair needs of the study's settings."""

    @property
    def repair_steps(self) -> int: ...
    @property
    def repair_rate(self) -> float: ...
    @property
    def n_exhaustive(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def seed(self) -> int: ...


def repaired_findings(
    model: HookedModel, ground: Ground, searches: Searches, config: Settings, progress: bool
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Train a copy on what the searches found, and ask of it what was asked of the model.

    Returns:
        Findings, and a row for each measure with the model before and after. Without anything found, nothing is
        repaired, and the one finding says so.
    """
    found = found_tokens(searches)
    if not len(found):
        claim = "found tokens no longer work after training on them"
        note = "no search flipped any prompt, so there is nothing to train on"
        return [Finding("repair.found_tokens", claim, float("nan"), verdict="not tested", note=note)], []
    training = AdversarialTraining(config.repair_steps, learning_rate=config.repair_rate, seed=config.seed, batch=48)
    words = {"allowed": ground.allowed, "banned": ground.banned}
    repaired = training.repair(model, ground.train, ground.free, found, **words, progress=progress)
    asked = _Asked(model, repaired, ground, searches, config)
    findings = [asked.found_tokens(found), *asked.accuracies(), asked.search(progress)]
    if config.n_exhaustive:
        findings.append(asked.every_choice())
    return findings, asked.rows


def found_tokens(searches: Searches) -> Int[Tensor, "m slot"]:
    """The tokens of any search that flipped a prompt, each choice once."""
    return torch.cat([found.ids[searches.flipped(name)] for name, found in searches.found.items()]).unique(dim=0)


class _Asked:
    """The same questions of a model before and after repair."""

    def __init__(
        self, before: HookedModel, after: HookedModel, ground: Ground, searches: Searches, config: Settings
    ) -> None:
        self.before, self.after, self.ground, self.searches, self.config = before, after, ground, searches, config
        self.known = ground.suffixes is not None
        self.rows: list[dict[str, Any]] = []

    def found_tokens(self, found: Int[Tensor, "m slot"]) -> Finding:
        """Whose prompts any of the found tokens still flips; the planted ones are among them, found or not."""
        if self.known and self.ground.suffixes is not None and self.ground.suffixes.planted:
            found = torch.cat([found, torch.tensor([self.ground.suffixes.planted])]).unique(dim=0)
        before, after = (self._flips(model, found) for model in (self.before, self.after))
        claim = f"the {len(found)} found choices of tokens flip fewer held-out prompts than before"
        return self._fallen("repair.found_tokens", claim, before, after, self.ground.moved)

    def accuracies(self) -> list[Finding]:
        """Right answers to clean prompts, and with random tokens at the free positions."""
        clean, seed = self.ground.clean, self.config.seed
        usable = usable_ids(self.before, allowed=self.ground.allowed, banned=self.ground.banned)
        batch = self.before.tokens(clean)
        positions = free_positions(batch, self.ground.free)
        drawn = torch.randint(len(usable), positions.shape, generator=torch.Generator().manual_seed(seed))
        found: list[Finding] = []
        for name, what, shown in (
            ("clean_accuracy", "clean prompts", batch),
            ("random_tokens_accuracy", "prompts with random tokens there", replaced(batch, positions, usable[drawn])),
        ):
            before, after = (self._right(model, shown) for model in (self.before, self.after))
            found.append(self._kept(f"repair.{name}", what, before, after))
        return [replace(found[0], expected=CLEAN if self.known else None), found[1]]

    def search(self, progress: bool) -> Finding:
        """Whose prompts a new search flips: for targets found again in the repaired model, and for the answer."""
        model, moved = self.after, self.ground.moved
        acts = model.capture(self.ground.train, sites=resid_post(), where=LAST)
        rows = probed(acts, self.config.seed)
        read = [site for site, row in zip(acts.sites, rows, strict=True) if row["eligible"]][:1]
        aims: list[Objective] = [Reach((target,)) for target in targets_of(acts, MeanDifference(null_draws=0), read)]
        if aim := answer_margin(model, moved):
            aims.append(aim)
        search = TokenSearch(
            budget=self.config.budget, width=self.config.width, top_k=self.config.top_k, seed=self.config.seed + 1
        )
        words = {"allowed": self.ground.allowed, "banned": self.ground.banned, "progress": progress}
        found = {
            str(number): search.search(model, moved, aim, self.ground.free, **words) for number, aim in enumerate(aims)
        }
        again = Searches(model, moved, self.searches.metric, self.config.budget, found)
        after = torch.stack([again.flipped(name) for name in found]).any(0) if found else torch.zeros(len(moved)).bool()
        names = [name for name in (TARGET, ANSWER) if name in self.searches.found]
        before = torch.stack([self.searches.flipped(name) for name in names]).any(0)
        claim = "a new search, for a target of the repaired model and for the answer, flips fewer prompts"
        made = self._fallen("repair.search", claim, before, after, moved)
        where = f"target at {read[0].short}" if read else "no layer of the repaired model may be a target"
        return replace(made, note=f"{where}; {made.note}")

    def every_choice(self) -> Finding:
        """Whose prompts any choice of tokens flips, where there are few enough."""
        few = self.ground.moved.take(range(min(len(self.ground.moved), self.config.n_exhaustive)))
        words: dict[str, Any] = {"allowed": self.ground.allowed, "banned": self.ground.banned}
        claim = "over every choice of tokens, fewer prompts can be flipped than before"
        try:
            run = every_choice(self.after, few, self.ground.free, self.searches.metric, **words)
        except ConfigError as error:
            return Finding("repair.every_choice", claim, float("nan"), verdict="not tested", note=str(error))
        before = torch.stack([self.searches.flipped(name) for name in self.searches.found]).any(0)[: len(few)]
        made = self._fallen("repair.every_choice", claim, before, run.flipped.any(1), few)
        return replace(made, note=f"{len(run.ids)} choices for each of {len(few)} prompts")

    def _flips(self, model: HookedModel, found: Int[Tensor, "m slot"]) -> Bool[Tensor, " n"]:
        moved, metric = self.ground.moved, self.searches.metric
        positions = free_positions(model.tokens(moved), self.ground.free)
        clean = metric(model.logits(moved), moved.prompts) > 0
        flipped = [
            (metric(logits_with(model, moved, positions, row.expand_as(positions)), moved.prompts) > 0) != clean
            for row in found
        ]
        return torch.stack(flipped).any(0)

    def _right(self, model: HookedModel, shown: TokenBatch) -> Bool[Tensor, " n"]:
        answers = torch.tensor(model.token_ids([prompt.answer or "" for prompt in self.ground.clean.prompts]))
        return observe(model, shown, [], LAST).logits.argmax(1) == answers

    def _fallen(self, name: str, claim: str, before: Tensor, after: Tensor, prompts: Contrast) -> Finding:
        estimate, interval = mean_of(after.double(), prompts.groups, seed=self.config.seed)
        rate, null = mean_of(before.double(), prompts.groups, seed=self.config.seed)
        null = replace(null, of="the model before repair")
        made = Finding(name, claim, estimate, interval, null, len(prompts), note=f"{rate:.2f} before")
        self._row(name, rate, estimate, len(prompts))
        made = made.judged("below", margin=0.1, no_effect=rate)
        return replace(made, expected=GONE if self.known else None)

    def _kept(self, name: str, what: str, before: Tensor, after: Tensor) -> Finding:
        groups, seed = self.ground.clean.groups, self.config.seed
        estimate, interval = mean_of(after.double(), groups, seed=seed)
        rate, null = mean_of(before.double(), groups, seed=seed)
        _, lost = mean_of(before.double() - after.double(), groups, seed=seed)
        claim = f"{what} are answered as well as before, within {MARGIN:g}"
        self._row(name, rate, estimate, len(after))
        null = replace(null, of="the model before repair")
        verdict = judge_absence(lost, margin=MARGIN)
        return Finding(name, claim, estimate, interval, null, len(after), verdict, note=f"{rate:.3f} before")

    def _row(self, name: str, before: float, after: float, n: int) -> None:
        self.rows.append({"measure": name.removeprefix("repair."), "before": before, "after": after, "n": n})
