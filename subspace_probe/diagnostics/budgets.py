"""What an audit will cost, and what of it fits a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from subspace_probe.core.reports import Table
from subspace_probe.diagnostics.cases import Case, CaseCheck
from subspace_probe.interventions.conditions import Condition

QUICK = 20.0
"""Times the cost of the measurement, for `budget="quick"`."""


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One check as it will be run, or the reason why not."""

    check: CaseCheck
    conditions: Sequence[Condition]
    cost: int
    reason: str = ""


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """All checks of an audit.

    Attributes:
        unit: cost of the measurement alone: every prompt without and with the intervention, in prompts run.
    """

    items: Sequence[Item]
    unit: int

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

    def table(self, shared: float, seconds: Mapping[str, float]) -> Table:
        """What was estimated and what it took; shared passes are divided by the number of prompts run in them."""
        runs = self.unit + sum(
            len(item.conditions) * _prompts(item) for item in self.items if not item.reason and item.conditions
        )
        rows = [
            {
                "check": item.check.name,
                "conditions": len(item.conditions),
                "times the measurement": round(item.cost / self.unit, 2),
                "seconds": round(
                    seconds.get(item.check.name, 0.0) + shared * len(item.conditions) * _prompts(item) / runs, 3
                ),
                "left out": item.reason,
            }
            for item in self.items
        ]
        rows.insert(0, {"check": "the measurement", "conditions": 2, "times the measurement": 1.0,
                        "seconds": round(shared * self.unit / runs, 3), "left out": ""})  # fmt: skip
        return Table.of(rows, "cost of each check: estimated in multiples of the measurement, and measured")


def _prompts(item: Item) -> int:
    return item.cost // len(item.conditions) if item.conditions else 0


def few(prompts: int) -> int:
    """Natural pairs under a budget, which counts in multiples of what `prompts` cost: a null takes forty of each."""
    return max(4, min(16, prompts // 4))


_LEFT = "left out for the budget"


def planned(case: Case, checks: Sequence[CaseCheck], limit: float | None) -> Plan:
    """Which checks run, in their order, until the budget is spent; a dear one is passed over for cheaper ones."""
    unit, spent = 2 * len(case.contrast), 0.0
    items: list[Item] = []
    for check in checks:
        reason = check.missing(case)
        if not reason and check.on == "natural" and case.natural is None:
            reason = case.no_natural
        if reason:
            items.append(Item(check, (), 0, reason))
            continue
        conditions = check.conditions(case)
        prompts = len(case.contrast) if check.on == "contrast" or case.natural is None else len(case.natural)
        cost = len(conditions) * prompts + check.passes(case)
        if limit is not None and spent + cost > limit * unit:
            of = f"{_LEFT} of {limit:g} times the measurement: it costs {cost / unit:.1f}"
            items.append(Item(check, (), cost, of))
            continue
        spent += cost
        items.append(Item(check, conditions, cost))
    return Plan(items, unit)
