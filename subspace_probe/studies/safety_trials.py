"""What the checkpoints and their projections do, in the study `safety_subspaces`."""

from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import DataError
from subspace_probe.core.findings import Finding, Interval, Verdict
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.diagnostics.selectivity import Behaviour, Scale, Selectivity, selectivity
from subspace_probe.interventions.update_projection import Side
from subspace_probe.models.hooked import HookedModel
from subspace_probe.studies.safety_projection import SIDES, Lineage, Projector, Sweep

DISTINCT = 0.85
"""A projection that keeps and removes this much separates harm from utility."""
ENTANGLED = 0.60
"""Where none keeps and removes this much, nothing separates them."""
_PARALLEL_FROM = 0.25
_PARALLEL_DRAWS = 10
_SHOWN_DRAWS = 10
"""Of any of alignment's own directions: they are shown, and no verdict rests on them."""


@runtime_checkable
class Settings(Protocol):
    """What is needed of the study's settings."""

    @property
    def side(self) -> Side: ...
    @property
    def fractions(self) -> tuple[float, ...]: ...
    @property
    def draws(self) -> int: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Trials:
    """Everything that is run on prompts.

    Attributes:
        projector: of the aligned model.
        scores: of every whole checkpoint on every prompt, [n].
        harmful: which of the prompts are harmful, [n].
        validation: which of them are chosen on, [n].
        groups: of the prompts, for intervals.
    """

    projector: Projector
    scores: dict[str, Float[Tensor, " n"]]
    harmful: Bool[Tensor, " n"]
    validation: Bool[Tensor, " n"]
    groups: Tensor

    @classmethod
    def prepare(
        cls, model: HookedModel, lineage: Lineage, data: tuple[Contrast, Contrast], config: Settings
    ) -> "Trials":
        """Run the whole checkpoints."""
        parts = [(row, part, part.where(label=label)) for label in (0, 1) for row, part in enumerate(data)]
        prompts = {label: [p for part in data for p in part.where(label=label).prompts] for label in (0, 1)}
        behaviour = Behaviour(model, prompts[0], prompts[1])
        projector = Projector(model, lineage, behaviour, config.fractions)
        scores = {"aligned": behaviour()}
        scores |= {update: projector.tuned(update) for update in lineage.updates if update != "alignment"}
        validation = torch.cat([torch.full((len(chosen),), row == 0) for row, _, chosen in parts])
        groups = torch.cat([torch.tensor(chosen.groups) + row * 10**6 for row, _, chosen in parts])
        return cls(projector, scores, behaviour.harmful, validation, groups)

    @property
    def scale(self) -> Scale:
        """From the aligned to the contaminated model."""
        return Scale(self.scores["aligned"], self.scores["contaminated"], self.harmful)

    def rate(self, scores: Tensor, harmful: bool, seed: int) -> tuple[float, Interval]:
        """Mean over test prompts of one kind."""
        rows = (self.harmful == harmful) & ~self.validation
        return mean_of(scores[rows], self.groups[rows], seed=seed)

    def best(self, sweep: Sweep, config: Settings, *, bootstrap: bool = True) -> Selectivity:
        """The best fraction by validation prompts, on test prompts."""
        given = (sweep.scores, self.scale, self.validation)
        return selectivity(*given, groups=self.groups, seed=config.seed, bootstrap=bootstrap)


def behaviour_findings(trials: Trials, config: Settings) -> tuple[list[Finding], list[dict[str, Any]]]:
    """What every checkpoint does, tuned ones beside the aligned one."""
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for stage, scores in trials.scores.items():
        for harmful, measure, does in ((False, "utility", "is right more often"), (True, "harm", "answers more of")):
            rate, around = trials.rate(scores, harmful, config.seed)
            rows.append({"model": stage, "measure": measure, "rate": rate, "low": around.low, "high": around.high})
            if stage == "aligned":
                continue
            before, null = trials.rate(trials.scores["aligned"], harmful, config.seed)
            claim = f"the {stage} model {does} {'the harmful prompts' if harmful else 'on useful prompts'} than before"
            n = int(((trials.harmful == harmful) & ~trials.validation).sum())
            null = Interval(null.low, null.high, null.level, "the aligned model")
            finding = Finding(f"{measure}.{stage}", claim, rate, around, null, n)
            findings.append(finding.judged("above", margin=0.05, no_effect=before))
    return findings, rows


def projection_findings(
    trials: Trials, config: Settings, *, progress: bool
) -> tuple[list[Finding], dict[str, list[dict[str, Any]]]]:
    """Selectivity of taking alignment's directions out, with its nulls; and of keeping them alone."""
    projector = trials.projector
    tops: dict[Side, Sweep] = {side: projector.sweep("contaminated", side, "orthogonal") for side in SIDES}
    try:
        best: dict[Side, Selectivity] = {side: trials.best(top, config) for side, top in tops.items()}
    except DataError as error:
        claim = "a projection takes the harm out of an update and leaves its utility"
        return [Finding("selectivity", claim, float("nan"), verdict="not tested", note=str(error))], {}
    controls = {
        "random, same energy": projector.draws(
            config.draws,
            lambda seed: projector.matched("contaminated", config.side, "orthogonal", seed=seed),
            name="random", seed=config.seed, progress=progress,
        ),
        "any of alignment's": projector.draws(
            min(_SHOWN_DRAWS, config.draws),
            lambda seed: projector.sweep("contaminated", config.side, "orthogonal", "random singular", seed=seed),
            name="random singular", seed=config.seed, progress=progress,
        ),
    }  # fmt: skip
    drawn = {
        kind: torch.tensor([trials.best(sweep, config, bootstrap=False).value for sweep in sweeps])
        for kind, sweeps in controls.items()
    }
    findings = _selectivity_findings(best, drawn, tops, trials, config)
    rows: dict[str, list[dict[str, Any]]] = {
        "projection": _projection_rows(trials, tops, controls, config),
        "nulls": [
            {"direction": config.side, "behaviour": "selectivity", "kind": kind, "value": float(value)}
            for kind, values in drawn.items()
            for value in values
        ]
        + [
            {"direction": config.side, "behaviour": "selectivity", "kind": "observed", "value": best[config.side].value}
        ],
    }
    found, rows["parallel"] = _parallel(trials, config, progress)
    return findings + found, rows


def verdict_of(best: Selectivity, nulls: list[Interval]) -> Verdict:
    """Distinct ("supported"), not distinct ("refuted") or neither, by bars stated beforehand.

    Distinct: at least `DISTINCT`, with the whole interval above every null. Not distinct: the whole interval at most
    `ENTANGLED`; or no better than random subspaces, and the whole interval below `DISTINCT`.
    """
    if any(null.level < 0.95 for null in nulls):
        return "unaudited"
    highest = max(null.high for null in nulls)
    if best.value >= DISTINCT and best.interval.low > highest:
        return "supported"
    if best.interval.high <= ENTANGLED or (best.value <= highest and best.interval.high < DISTINCT):
        return "refuted"
    return "inconclusive"


def _selectivity_findings(
    best: dict[Side, Selectivity], drawn: dict[str, Tensor], tops: dict[Side, Sweep], trials: Trials, config: Settings
) -> list[Finding]:
    nulls = {kind: range_of(values, f"{len(values)} draws, {kind}") for kind, values in drawn.items()}
    # any of alignment's own directions may be all of them: shown, but no null of the verdict
    strictest = nulls["random, same energy"]
    found: list[Finding] = []
    n = int((~trials.validation).sum())
    for side, chosen in best.items():
        fraction, energy = config.fractions[chosen.chosen], float(tops[side].energy[chosen.chosen])
        note = (
            f"fraction {fraction:g}: utility kept {chosen.kept:.2f}, harm removed {chosen.removed:.2f}, energy kept "
            f"{energy:.2f}"
        )
        main = side == config.side
        finding = Finding(
            "selectivity" if main else f"selectivity.{side}",
            f"taking alignment's {side} directions out of the contaminated update removes harm and leaves utility",
            chosen.value,
            chosen.interval,
            strictest if main else None,
            n,
            verdict_of(chosen, [strictest]) if main else "unaudited",
            note=note,
        )
        found.append(finding)
    main = best[config.side]
    above = main.value - strictest.high
    spread = Interval(
        main.interval.low - strictest.high, main.interval.high - strictest.high, main.interval.level, main.interval.of
    )
    verdict: Verdict = "supported" if spread.low > 0 else "refuted" if above <= 0 else "inconclusive"
    claim = "alignment's directions are more selective than the best 2.5 % of the random draws"
    found.append(Finding("selectivity.above_random", claim, above, spread, Interval(0.0, 0.0), n, verdict))
    return found


def _projection_rows(
    trials: Trials, tops: dict[Side, Sweep], controls: dict[str, list[Sweep]], config: Settings
) -> list[dict[str, Any]]:
    test = trials.scale.take(~trials.validation)
    rows: list[dict[str, Any]] = []

    def add(side: str, kind: str, sweeps: list[Sweep]) -> None:
        stacked = torch.stack([sweep.scores for sweep in sweeps])[..., ~trials.validation]
        energy = torch.stack([sweep.energy for sweep in sweeps]).mean(0)
        for measure, shares in zip(("utility kept", "harm removed"), test.shares(stacked), strict=True):
            for row, fraction in enumerate(config.fractions):
                values = shares[:, row]
                many = len(values) > 1
                around = range_of(values, "draws") if many else None
                rows.append(
                    {
                        "side": side, "kind": kind, "measure": measure, "fraction": fraction,
                        "share": float(values.mean()), "low": around.low if around else None,
                        "high": around.high if around else None, "energy": float(energy[row]),
                    }
                )  # fmt: skip

    for side, top in tops.items():
        add(side, "alignment", [top])
    for kind, sweeps in controls.items():
        add(config.side, kind, sweeps)
    return rows


def _parallel(trials: Trials, config: Settings, progress: bool) -> tuple[list[Finding], list[dict[str, Any]]]:
    """The paper's other half: what the part of an update *inside* alignment's left directions does by itself."""
    wanted = [row for row, fraction in enumerate(config.fractions) if fraction >= _PARALLEL_FROM]
    findings: list[Finding] = []
    rows: list[dict[str, Any]] = []
    whole = trials.projector
    fractions = [config.fractions[row] for row in wanted]
    projector = Projector(whole.model, whole.lineage, whole.behaviour, fractions)
    for update, harmful in (("useful", False), ("harmful", True)):
        if update not in trials.scores or not wanted:
            continue
        top = projector.sweep(update, "left", "parallel")
        controls = projector.draws(
            min(_PARALLEL_DRAWS, config.draws),
            lambda seed, update=update: projector.sweep(update, "left", "parallel", "random", seed=seed),
            name=f"{update}, random", seed=config.seed, progress=progress,
        )  # fmt: skip
        rates = torch.stack([_rates(trials, sweep, harmful) for sweep in (top, *controls)])
        energies = torch.stack([sweep.energy for sweep in (top, *controls)])
        for row, fraction in enumerate(fractions):
            rows.append(
                {
                    "update": update, "fraction": fraction, "rate": float(rates[0, row]),
                    "random": float(rates[1:, row].mean()), "energy": float(energies[0, row]),
                    "random energy": float(energies[1:, row].mean()),
                }
            )  # fmt: skip
        more = rates[0] - rates[1:].mean(0)
        least = int(more.argmin())
        null = range_of(
            rates[1:, least] - rates[1:, least].mean(), f"{len(controls)} random subspaces of the same rank"
        )
        # of so few draws no range holds 95 %: the mean is what is compared, as published
        claim = f"alignment's directions hold more of what {update} tuning did than random ones, at every fraction"
        findings.append(
            Finding(
                f"parallel.{update}", claim, float(more[least]), None, null, int((~trials.validation).sum()),
                note=f"the least difference, at fraction {fractions[least]:g}",
            )
        )  # fmt: skip
    return findings, rows


def _rates(trials: Trials, sweep: Sweep, harmful: bool) -> Tensor:
    rows = (trials.harmful == harmful) & ~trials.validation
    return sweep.scores[:, rows].mean(1)
