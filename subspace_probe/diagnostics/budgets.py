"""What an audit will cost, and what of it fits a budget."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from subspace_probe.core.reports import Table
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition

QUICK = 20.0
"""Times the cost of the measurement, for `budget="quick"`."""


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


def _rerun(case: Case, conditions: Sequence[Condition]) -> float:
    """How many whole passes the conditions come to: what lies below their lowest edit is computed once for all."""
    n_layers = case.model.spec.n_layers
    total = 0.0
    for condition in conditions:
        sites = [] if condition is None else [site.lifted(n_layers) for site in condition.edits(n_layers)]
        total += (n_layers - min((site.layer for site in sites), default=n_layers)) / n_layers
    return total


def few(prompts: int) -> int:
    """Natural pairs under a budget, which counts in multiples of what `prompts` cost: a null takes forty of each."""
    return max(4, min(16, prompts // 4))


_LEFT = "left out for the budget"


def planned(case: Case, checks: Sequence[CaseCheck], limit: float | None) -> Plan:
    """Which checks run, in their order, until the budget is spent; a dear one is passed over for cheaper ones."""
    unit, spent = len(case.contrast) * (1.0 + _rerun(case, [case.intervention])), 0.0
    items: list[Item] = []
    for check in checks:
        started = time.perf_counter()
        item = _item(case, check)
        if not item.reason and limit is not None and spent + item.cost > limit * unit:
            of = f"{_LEFT} of {limit:g} times the measurement: it costs {item.cost / unit:.1f}"
            item = Item(check, cost=item.cost, reason=of)
        spent += 0.0 if item.reason else item.cost
        items.append(replace(item, seconds=time.perf_counter() - started))
    return Plan(items, unit)


def _item(case: Case, check: CaseCheck) -> Item:
    reason = check.missing(case)
    if not reason and check.on == "natural" and case.natural is None:
        reason = case.no_natural
    if reason:
        return Item(check, reason=reason)
    conditions = check.conditions(case)
    prompts = len(case.contrast) if check.on == "contrast" or case.natural is None else len(case.natural)
    shared = prompts * _rerun(case, conditions)
    return Item(check, conditions, shared + check.passes(case), shared)
