"""What steering does to texts and to a logit difference, beside random directions of equal norm, as a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.reports import Provenance, Report, Table, number
from subspace_probe.diagnostics.auditing import audit
from subspace_probe.diagnostics.intervals import mean_of, range_of
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.steer import Steer
from subspace_probe.metrics.answers import LogitDifference
from subspace_probe.models.hooked import HookedModel


@final
@dataclass(frozen=True, eq=False)
class Steering:
    """One direction at several strengths, on some prompts.

    Args:
        doses: the same steering at each strength.
        contrast: the prompts.
        draws: random directions of equal norm at each strength.
        seed: of the draws and of the bootstrap.
    """

    model: HookedModel
    doses: Sequence[Steer]
    contrast: Contrast
    draws: int = 20
    seed: int = 0
    progress: bool = False

    def completions(self, n: int, max_new_tokens: int) -> Table:
        """What the model writes after the first `n` prompts: unsteered, at each strength, along a random direction."""
        strongest = max(self.doses, key=lambda dose: abs(dose.strength))
        conditions: dict[str, list[Steer]] = {"unsteered": []}
        conditions |= {f"strength {dose.strength:+g}": [dose] for dose in self.doses}
        conditions[f"random {strongest.strength:+g}"] = [self._random(strongest, 0)]
        shown = self.contrast.prompts[:n]
        bar: Callable[..., tqdm] = tqdm
        rows: list[tuple[str, str, str]] = []
        for condition, dose in bar(conditions.items(), desc="generate", disable=not self.progress, leave=False):
            texts = self.model.generate(shown, interventions=dose, max_new_tokens=max_new_tokens)
            rows += [(prompt.shown, condition, text) for prompt, text in zip(shown, texts, strict=True)]
        about = "greedy continuations; the random direction has the norm of the strongest steering"
        return Table(("prompt", "condition", "text"), tuple(rows), about)

    def effects(self) -> Report:
        """The logit difference of the prompts' answers and foils at each strength, against random directions.

        Raises:
            ConfigError: an answer and a foil that begin with the same token.
        """
        metric, (answer, foil) = LogitDifference(self.model), self._words()
        randoms = [self._random(dose, draw) for dose in self.doses for draw in range(self.draws)]
        planned = [None, *self.doses, *randoms]
        values = outcomes(
            self.model, self.contrast.prompts, planned, [metric], progress=self.progress, name="logit difference"
        )[0]
        clean, steered = values[0], values[1 : 1 + len(self.doses)]
        drawn = values[1 + len(self.doses) :].reshape(len(self.doses), self.draws, -1)
        behaviour = f"logit of {answer} minus {foil}"
        spread = float(clean.std()) if len(clean) > 1 else 0.0
        findings = [
            self._finding(dose, behaviour, clean, own, null, margin=0.1 * spread)
            for dose, own, null in zip(self.doses, steered, drawn, strict=True)
        ]
        tables = {
            "summary": Table(("sentence",), tuple((finding.note,) for finding in findings)),
            "doses": Table(
                ("strength", "unsteered", "steered", "wrong_way"),
                tuple(
                    (dose.strength, float(clean.mean()), float(own.mean()), _against(own - clean))
                    for dose, own in zip(self.doses, steered, strict=True)
                ),
                f"mean {behaviour} at each strength, and the share of prompts moved against the mean",
            ),
            "strength": self._rates(f"{answer} over {foil}", clean, steered, drawn),
            "nulls": self._nulls(behaviour, clean, steered, drawn),
        }
        strongest = max(self.doses, key=lambda dose: abs(dose.strength))
        checked = audit(self.model, strongest, self.contrast, metric, checks=["integrity"], seed=self.seed)
        return Report("steer", tuple(findings), tables) + checked

    @property
    def measurable(self) -> bool:
        """Whether every prompt says which answer to measure, and against what."""
        return all(prompt.answer and prompt.foil for prompt in self.contrast.prompts)

    def provenance(self, *, seconds: float, **settings: object) -> Provenance:
        """Where the report comes from."""
        return Provenance.now(
            model=self.model.spec.name,
            fingerprint=self.model.fingerprint,
            data=self.contrast.name,
            config={"strengths": [dose.strength for dose in self.doses], "random": self.draws, **settings},
            seed=self.seed,
            seconds=seconds,
        )

    def _words(self) -> tuple[str, str]:
        """How to call the two words; checked to be two tokens."""
        words = {(prompt.answer or "", prompt.foil or "") for prompt in self.contrast.prompts}
        for answer, foil in words:
            ids = self.model.token_ids([answer, foil])
            if ids[0] == ids[1]:
                raise ConfigError(
                    f"{answer!r} and {foil!r} begin with the same token, {self.model.tokenizer.decode(ids[:1])!r}, and "
                    "only first tokens are scored. Choose words that begin differently."
                )
        return words.pop() if len(words) == 1 else ("answer", "foil")

    def _random(self, dose: Steer, draw: int) -> Steer:
        return dose.with_subspace(random_like(dose.subspace, seed=self.seed + draw))

    def _finding(
        self, dose: Steer, behaviour: str, clean: Tensor, own: Tensor, drawn: Tensor, *, margin: float
    ) -> Finding:
        change = own - clean
        estimate, interval = mean_of(change, self.contrast.groups, seed=self.seed)
        null = (
            range_of((drawn - clean).mean(1), f"{self.draws} random directions of equal norm") if self.draws else None
        )
        name = f"logit_difference.{dose.strength:+g}"
        claim = f"steering at {dose.strength:+g} changes the {behaviour} beyond random directions of equal norm"
        found = Finding(name, claim, estimate, interval, null, len(own)).judged("apart", margin=margin)
        before, after = number(float(clean.mean())), number(float(own.mean()))
        note = f"At {dose.strength:+g} the {behaviour} goes from {before} to {after}"
        note += f" ({_against(change):.0%} of prompts the other way)" if len(own) > 1 else ""
        if null:
            note += f"; {null.of} change it by {number(null.low)} to {number(null.high)}"
        note += "." if len(own) > 1 else "; one prompt gives no interval, so no verdict: add prompts."
        return Finding(name, claim, estimate, interval, null, len(own), found.verdict, note=note)

    def _rates(self, behaviour: str, clean: Tensor, steered: Tensor, drawn: Tensor) -> Table:
        """Share of prompts that prefer the answer, by strength."""
        rows: list[tuple[str, str, float, float, float, float]] = []
        for strength, values, null in (
            (0.0, clean, clean[None]),
            *((dose.strength, own, null) for dose, own, null in zip(self.doses, steered, drawn, strict=True)),
        ):
            rate, interval = mean_of((values > 0).double(), self.contrast.groups, seed=self.seed)
            rows.append(("found", behaviour, strength, rate, interval.low, interval.high))
            if len(null):
                rates = (null > 0).double().mean(1)
                spread = range_of(rates, "random directions")
                rows.append(("random", behaviour, strength, float(rates.mean()), spread.low, spread.high))
        rows.sort(key=lambda row: row[2])
        columns = ("direction", "behaviour", "strength", "rate", "low", "high")
        return Table(columns, tuple(rows), "share of prompts whose next token is rather the answer than the foil")

    def _nulls(self, behaviour: str, clean: Tensor, steered: Tensor, drawn: Tensor) -> Table:
        """The mean change along every random direction, and the observed one, by strength."""
        rows: list[tuple[str, str, str, float]] = []
        for dose, own, null in zip(self.doses, steered, drawn, strict=True):
            name = f"strength {dose.strength:+g}"
            rows += [(name, behaviour, "random direction", value) for value in (null - clean).mean(1).tolist()]
            rows.append((name, behaviour, "observed", float((own - clean).mean())))
        return Table(("direction", "behaviour", "kind", "value"), tuple(rows), "mean change of the logit difference")


def _against(change: Tensor) -> float:
    """The share of prompts that moved against the mean."""
    return float((change * change.mean().sign() < 0).double().mean())
