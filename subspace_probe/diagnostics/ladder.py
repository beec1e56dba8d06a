"""The realisability ladder: can states be taken where they should not be, by whom, and does behaviour follow?

Activation level: states are written, which only who runs the model can do. Embedding level: what tokens become is
shifted a little. Token level: other tokens, which anyone can send. A guard whose states can be moved but that no token
moves is "steerable, not reachable". Each level stands beside its controls: random changes of equal size, and the same
effort in the wrong direction. After Winninger et al. 2025, https://arxiv.org/abs/2503.06269.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.intervals import mean_of, range_of
from subspace_probe.core.protocols import Metric
from subspace_probe.core.reports import Provenance, Report, Table, number
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.diagnostics.climber import LEVELS, Climbed, Climber, Effort
from subspace_probe.diagnostics.eligibility import Eligibility, eligibility
from subspace_probe.diagnostics.rungs import Rung
from subspace_probe.interventions.targets import HalfSpace
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.metrics.behaviour import kl
from subspace_probe.models.hooked import HookedModel

MARGIN = 0.2
"""Half-width of "no more than the controls" on a rate: stated beforehand, the same everywhere."""
Reached = Literal["reachable", "steerable, not reachable", "not steerable", "not eligible", "inconclusive"]


def ladder(
    model: HookedModel,
    contrast: Contrast,
    targets: Sequence[HalfSpace],
    free: Sequence[Where],
    metric: str | Metric,
    *,
    train: Contrast,
    label: int = 1,
    neutral: Contrast | None = None,
    effort: Effort | None = None,
    allowed: Collection[int] | None = None,
    banned: Collection[int] = (),
    ineligible: Literal["refuse", "flag"] = "refuse",
    margin: float = MARGIN,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Reroute the prompts of one class at every level, one target at a time, with controls and a verdict each.

    Args:
        contrast: prompts that nothing was fitted on; those of `label` are rerouted.
        targets: half-spaces, each with its site and a one-token `where`; `targets_of` finds them.
        free: the tokens that embeddings and tokens may be changed at, as many in every prompt.
        metric: above 0 for one behaviour, below for the other; behaviour is flipped where its sign changes.
        train: clean prompts of both classes, for the gate, class means and covariances.
        neutral: prompts that should not change; by default those of `contrast` that are of the other class.
        effort: budgets and numbers of controls.
        allowed, banned: which tokens the search may use; special ones it never does.
        ineligible: what to do with a target at a layer whose probe is weak: "refuse" raises, "flag" lists it.
        margin: half-width of "no more than the controls" on a rate.
        seed: of every draw.

    Returns:
        A report with a finding for each target, level and measure, and the tables `verdicts`, `ladder`, `prompts`,
        `searches`, `persistence`, `elsewhere`, `eligibility`.

    Raises:
        ConfigError: a target that is not eligible; no targets, two at one site, or one without a site.
        DataError: fewer than two prompts to reroute, or none that should stay.
        PositionError: free positions that differ in number, or a target before all of them.
    """
    places = [_site(target, model) for target in targets]
    if not places or len(set(places)) < len(places):
        raise ConfigError(
            f"Targets at {', '.join(site.short for site in places) or 'no site'} were given. Give at least one, for "
            "instance targets_of(acts, finder, sites), and each at a site of its own."
        )
    effort = effort or Effort()
    judge = metric_for(metric, model)
    moved, kept = contrast.where(label=label), contrast.where(label=1 - label) if neutral is None else neutral
    if len(moved) < 2 or not len(kept):
        raise DataError(
            f"There are {len(moved)} prompts of label {label} to reroute and {len(kept)} that should stay. Two and one "
            "are needed at least; give others with neutral=."
        )
    climber = Climber(model, moved, kept, label, free, effort, allowed, banned, seed, progress)
    gates: list[Eligibility] = []
    told: list[_Told] = []
    for target, site in zip(targets, places, strict=True):
        later = [Site(layer) for layer in range(site.layer, model.spec.n_layers) if Site(layer).order >= site.order]
        sites = sorted({site, *later}, key=lambda each: each.order)
        acts = model.capture(train, sites=sites, where=target.where or LAST)
        gates.append(eligibility(acts, site, draws=effort.permutations, seed=seed))
        if ineligible == "refuse":
            gates[-1].require()
        if gates[-1].eligible:
            told.append(_Told(climber.climb(target, site, acts), judge, margin, seed))
    return _report(model, contrast, name_of(metric), gates, told, effort, seed)


def _site(target: HalfSpace, model: HookedModel) -> Site:
    if target.site is None:
        raise ConfigError(f"{target!r} does not say at which site it is to be reached. Give it a site.")
    return target.site.resolve(model.spec.n_layers)


@final
@dataclass(frozen=True, eq=False)
class _Told:
    """What one climb showed, as findings and rows."""

    run: Climbed
    metric: Metric
    margin: float
    seed: int

    def shown(self, rung: Rung, measure: str) -> Bool[Tensor, "draws n"]:
        """Of every draw and prompt, whether the target was met, or the behaviour flipped."""
        run = self.run
        if measure == "target met":
            return rung.met(run.target, run.site, slack=0.01 * run.way)
        return rung.flipped(run.clean, self.metric, run.moved.prompts)

    def finding(self, level: str, measure: str) -> Finding:
        """The rate at one level, against the range of its controls."""
        own = self.shown(self.run.rung(level, "rerouted"), measure)[0].double()
        estimate, interval = mean_of(own, self.run.moved.groups, seed=self.seed)
        controls = [self.shown(rung, measure).double().mean(1) for rung in self.run.controls(level)]
        rates = torch.cat(controls)
        null = Interval(float(rates.min()), float(rates.max()), of=f"{len(rates)} controls, all of them")
        claim = f"{_CLAIMS[level]} {'reaches the target' if measure == 'target met' else 'flips the behaviour'}"
        name = f"{self.run.site.short}.{level}.{measure.split()[1]}"
        note = ", ".join(
            f"{condition} {number(float(values.mean()))}"
            for condition, values in zip([rung.condition for rung in self.run.controls(level)], controls, strict=True)
        )
        found = Finding(name, f"{claim} beyond its controls", estimate, interval, null, len(own), note=note)
        return found.judged("above", margin=self.margin, no_effect=float(rates.mean()))

    def verdict(self) -> tuple[Reached, str]:
        """What the levels say together, and why."""
        by = {level: self.finding(level, "behaviour flipped") for level in LEVELS}
        act, token = by["activation"].verdict, by["token"].verdict
        said = ", ".join(f"{level} {found.estimate:.0%}" for level, found in by.items())
        if token == "supported":
            reached: Reached = "reachable"
        elif act == "supported" and token == "refuted":
            reached = "steerable, not reachable"
        elif act == "refuted" and token == "refuted":
            reached = "not steerable"
        else:
            reached = "inconclusive"
        within = f" within {self.run.effort.tokens.budget} rows a prompt" if reached != "reachable" else ""
        return reached, f"behaviour flipped: {said}{within}"

    def rates(self) -> list[dict[str, object]]:
        """Rows of the figure: every level, measure and condition with its interval."""
        rows: list[dict[str, object]] = []
        for rung in self.run.rungs:
            for measure in ("target met", "behaviour flipped"):
                values = self.shown(rung, measure).double()
                if len(values) > 1:
                    rate, spread = float(values.mean()), range_of(values.mean(1), "draws")
                else:
                    rate, spread = mean_of(values[0], self.run.moved.groups, seed=self.seed)
                rows.append({
                    "site": self.run.site.short, "level": rung.level, "measure": measure,
                    "condition": rung.condition, "rate": rate, "low": spread.low, "high": spread.high,
                    "n": values.shape[1],
                })  # fmt: skip
        return rows

    def prompts(self) -> list[dict[str, object]]:
        """Every prompt at every level."""
        run = self.run
        rows: list[dict[str, object]] = []
        for level in LEVELS:
            rung = run.rung(level, "rerouted")
            states = rung.draws[0].states[run.site]
            columns = {
                "score": run.target.score(states), "percentile": run.statistics.percentile(states),
                "met": self.shown(rung, "target met")[0], "flipped": self.shown(rung, "behaviour flipped")[0],
            }  # fmt: skip
            for row, prompt in enumerate(run.moved.prompts):
                ids = run.tokens.ids[row].tolist() if level == "token" else []
                rows.append({
                    "site": run.site.short, "level": level, "prompt": prompt.shown,
                    **{name: values[row].item() for name, values in columns.items()},
                    "rows": int(run.rows(level)[row]), "ids": " ".join(map(str, ids)),
                })  # fmt: skip
        return rows

    def persistence(self) -> list[dict[str, object]]:
        """How much of it is left in later layers."""
        run, rows = self.run, list[dict[str, object]]()
        for level in LEVELS:
            states = run.rung(level, "rerouted").draws[0].states
            for site in states:
                moved = states[site] - run.clean.states[site]
                rows.append({
                    "site": run.site.short, "level": level, "at": site.short,
                    "score": _mean(run.statistics.score(site, states[site])),
                    "clean": _mean(run.statistics.score(site, run.clean.states[site])),
                    "cosine": _mean(run.statistics.cosine(site, moved)),
                })  # fmt: skip
        return rows

    def elsewhere(self) -> list[dict[str, object]]:
        """What the same changes do to prompts that should stay as they are."""
        run, rows = self.run, list[dict[str, object]]()
        for rung in run.elsewhere:
            away = torch.stack([kl(run.untouched.logits, draw.logits) for draw in rung.draws]).mean(0)
            same = torch.stack([draw.logits.argmax(1) == run.untouched.logits.argmax(1) for draw in rung.draws])
            estimate, spread = mean_of(away, run.kept.groups, seed=self.seed)
            rows.append({
                "site": run.site.short, "level": rung.level, "condition": rung.condition, "kl": estimate,
                "low": spread.low, "high": spread.high, "same_token": _mean(same.double()), "n": len(away),
            })  # fmt: skip
        return rows

    def searches(self) -> list[dict[str, object]]:
        """What each search found with the same budget, and what it took."""
        run, rows = self.run, list[dict[str, object]]()
        for name, (found, observed) in run.searches.items():
            rung = Rung("token", name, (observed,))
            rows.append({
                "site": run.site.short, "search": name,
                "flipped": _mean(self.shown(rung, "behaviour flipped").double()),
                "met": _mean(self.shown(rung, "target met").double()),
                "budget": run.effort.tokens.budget, "rows": _mean(found.rows.double()),
                "found_at": _mean(found.found_at.double()), "layer_forwards": found.layer_forwards / len(found.rows),
            })  # fmt: skip
        return rows


_CLAIMS = {
    "activation": "writing the state",
    "embedding": "a small shift of the free positions' embeddings",
    "token": "other tokens at the free positions",
}


def _mean(values: Float[Tensor, "*shape"]) -> float:
    return float(values.double().mean())


def _report(
    model: HookedModel,
    contrast: Contrast,
    metric: str,
    gates: Sequence[Eligibility],
    told: Sequence[_Told],
    effort: Effort,
    seed: int,
) -> Report:
    findings = tuple(
        each.finding(level, measure)
        for each in told
        for level in LEVELS
        for measure in ("target met", "behaviour flipped")
    )
    ran = {each.run.site: each.verdict() for each in told}
    verdicts = [
        {"site": gate.site.short, "verdict": v, "reason": why}
        for gate in gates
        for v, why in [ran.get(gate.site, ("not eligible", gate.reading))]
    ]
    tables = {
        "summary": Table.of([{"sentence": f"{v['site']}: {v['verdict']} ({v['reason']})."} for v in verdicts]),
        "verdicts": Table.of(verdicts, "what the levels say together, for each target"),
        "eligibility": Table.of(
            [
                {
                    "site": gate.site.short, "accuracy": gate.accuracy, "least": gate.least, "p": gate.p,
                    "folds": gate.folds, "n": gate.n, "eligible": gate.eligible,
                }
                for gate in gates
            ],
            "how well the class is read where a target lies, cross-validated",
        ),
    }  # fmt: skip
    about = {
        "ladder": ("rates", f"share of prompts at each level, rerouted and under controls; behaviour is {metric}"),
        "prompts": ("prompts", "every prompt at every level; percentile: clean states that lie no farther out"),
        "persistence": ("persistence", "mean coordinate in later layers, -1 at the clean class and 1 at the other one"),
        "elsewhere": ("elsewhere", "the same changes on prompts that should stay as they are; KL in nats"),
        "searches": ("searches", "token searches of one budget, in rows a prompt, and what they found"),
    }
    for name, (method, sentence) in about.items():
        if told:
            tables[name] = Table.of([row for each in told for row in getattr(each, method)()], sentence)
    config = {"metric": metric, "effort": repr(effort), "targets": [gate.site.short for gate in gates]}
    provenance = Provenance.now(
        model=model.spec.name, fingerprint=model.fingerprint, data=contrast.name, config=config, seed=seed
    )
    return Report("ladder", findings, tables, provenance)
