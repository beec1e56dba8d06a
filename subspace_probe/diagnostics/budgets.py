"""What an audit will cost, and what of it fits a budget."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.reports import Table
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition

QUICK = 14.0
"""Times the cost of the measurement that `budget="quick"` plans for; with captures and the like it stays under 20."""
SHORT = 1.6
"""What a token costs where a pass goes on from a prefix by a few of them, beside one of a whole prompt; measured."""


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One check as it will be run, or the reason why not.

    Attributes:
        cost: in prompts run; `shared` is the part of it that is run in the passes of all checks.
        seconds: what planning it took.
    """

    check: CaseCheck
    conditions: Sequence[Condition] = ()
    cost: float = 0.0
    shared: float = 0.0
    seconds: float = 0.0
    reason: str = ""


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All checks of an audit.

    Attributes:
        unit: cost of the measurement alone, every prompt without and with the intervention, in prompts run from the
            first layer to the last.
    """

    items: Sequence[Item]
    unit: float

    @property
    def cost(self) -> float:
        """Of the checks that will run, in multiples of the measurement."""
        return sum(item.cost for item in self.items if not item.reason) / self.unit

    def announced(self) -> str:
        """One line on what will run."""
        running = [item for item in self.items if not item.reason]
        left = [item.check.name for item in self.items if item.reason.startswith(_LEFT)]
        shown = ", ".join(f"{item.check.name} {item.cost / self.unit:.1f}" for item in running if item.cost)
        text = f"audit: {len(running)} checks, about {self.cost:.0f} times the measurement ({shown})"
        return text + (f"; left out for the budget: {', '.join(left)}" if left else "")

    def spent(self, shared: float, seconds: Mapping[str, float]) -> str:
        """One line on what it took."""
        rows = self.table(shared, seconds).records()
        total = sum(row["seconds"] for row in rows)
        dear = sorted(rows[1:], key=lambda row: -row["seconds"])[:4]
        return f"audit: {total:.1f} s, most for " + ", ".join(f"{row['check']} {row['seconds']:.1f}" for row in dear)

    def table(self, shared: float, seconds: Mapping[str, float]) -> Table:
        """What was estimated and what it took; shared passes are divided by what was run in them."""
        second = shared / (self.unit + sum(item.shared for item in self.items))
        rows = [
            {
                "check": item.check.name,
                "conditions": len(item.conditions),
                "times the measurement": round(item.cost / self.unit, 2),
                "seconds": round(item.seconds + seconds.get(item.check.name, 0.0) + second * item.shared, 3),
                "left out": item.reason,
            }
            for item in self.items
        ]
        rows.insert(0, {"check": "the measurement", "conditions": 2, "times the measurement": 1.0,
                        "seconds": round(second * self.unit, 3), "left out": ""})  # fmt: skip
        return Table.of(rows, "cost of each check: estimated in multiples of the measurement, and measured")


def limit_of(budget: float | str | None) -> float | None:
    """A budget as a number.

    Raises:
        ConfigError: neither "quick" nor a positive number.
    """
    if budget is None:
        return None
    if isinstance(budget, str) and budget != "quick":
        raise ConfigError(f"budget={budget!r} was given. Give 'quick', or how many times the measurement it may cost.")
    limit = QUICK if isinstance(budget, str) else float(budget)
    if not limit > 0:
        raise ConfigError(f"budget={budget!r} was given. It is a multiple of the cost of the measurement: 20, say.")
    return limit


def reruns(case: Case, batch: TokenBatch, conditions: Sequence[Condition]) -> float:
    """How many whole passes over the prompts the conditions come to.

    What lies below their lowest edit, and before their first token, is computed once for all; the unembedding of the
    last token is not.
    """
    spec = case.model.spec
    block, head = 12 * spec.d_model**2, spec.d_vocab * spec.d_model
    total, known = 0.0, dict[Where, float]()
    for condition in conditions:
        if condition is None:
            continue
        sites = [site.lifted(spec.n_layers) for site in condition.edits(spec.n_layers)]
        layers = spec.n_layers - min((site.layer for site in sites), default=spec.n_layers)
        if condition.where not in known:
            known[condition.where] = _columns(batch, condition.where)
        total += SHORT * layers * known[condition.where] * block + head
    return total / (spec.n_layers * batch.ids.shape[1] * block + head)


def _columns(batch: TokenBatch, where: Where) -> int:
    touched = (batch.select(where, batch.positions) & batch.mask).any(0).nonzero()
    return batch.ids.shape[1] - int(touched[0]) if len(touched) else 1


def few(prompts: int) -> int:
    """Natural pairs under a budget, which counts in multiples of what `prompts` cost: a null takes forty of each."""
    return max(4, min(16, prompts // 4))


_LEFT = "left out for the budget"


def planned(case: Case, checks: Sequence[CaseCheck], limit: float | None) -> Plan:
    """Which checks run, in their order, until the budget is spent; a dear one is passed over for cheaper ones."""
    natural = None if case.natural is None else case.model.tokens(case.natural.prompts)
    batch = case.model.tokens(case.contrast)
    unit, spent = batch.size * (1.0 + reruns(case, batch, [case.intervention])), 0.0
    items: list[Item] = []
    for check in checks:
        started = time.perf_counter()
        if limit is not None and spent >= limit * unit:
            items.append(Item(check, reason=f"{_LEFT} of {limit:g} times the measurement, which was spent"))
            continue
        item = _item(case, check, batch if check.on == "contrast" or natural is None else natural)
        if not item.reason and limit is not None and spent + item.cost > limit * unit:
            of = f"{_LEFT} of {limit:g} times the measurement: it costs {item.cost / unit:.1f}"
            item = Item(check, cost=item.cost, reason=of)
        spent += 0.0 if item.reason else item.cost
        items.append(replace(item, seconds=time.perf_counter() - started))
    return Plan(items, unit)


def _item(case: Case, check: CaseCheck, batch: TokenBatch) -> Item:
    """What one check takes on the prompts that it is asked on."""
    reason = check.missing(case)
    if not reason and check.on == "natural" and case.natural is None:
        reason = case.no_natural
    if reason:
        return Item(check, reason=reason)
    conditions = check.conditions(case)
    shared = batch.size * reruns(case, batch, conditions)
    return Item(check, conditions, shared + check.passes(case), shared)
