"""The data of an audit's figures, gathered from the checks that ran."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.reports import Table
from subspace_probe.diagnostics.cases import Case
from subspace_probe.diagnostics.dormancy import Coordinates, coordinates, natural_range
from subspace_probe.diagnostics.held_out import by_prompt
from subspace_probe.linalg.illusions import capacity

POINTS, AXES = 400, 3
"""At most so many rows of a histogram's table, over at most so many coordinates."""
PARTS = ("read part", "unread part", "both parts", "read part, not rescaled")
"""What the subspace is split into, in the order of the check's conditions."""

Row = dict[str, object]


def tables_of(case: Case, values: Mapping[str, Tensor]) -> dict[str, Table]:
    """Tables for the figures that this audit has data for.

    Args:
        values: the metric under each check's conditions, shape [condition, n], by the check's name.
    """
    rows = {"illusion": illusion_rows, "dormancy": dormancy_rows, "capacity": capacity_rows}
    about = {
        "illusion": "One row for each part exchanged between the prompts of a natural pair, and one for each random "
        "subspace: the share of the difference in the metric, and of prompts that come nearer to their partner's.",
        "dormancy": "Coordinates along the part of the subspace that is read, natural states and patched ones (a "
        "sample of at most 400); low and high hold the middle 99.8 % of all natural ones.",
        "capacity": "Share of the difference between the partners: to first order in the gradients from base to "
        "source, and as run.",
    }
    if case.natural is None:
        return {}
    made = {name: make(case, values) for name, make in rows.items()}
    return {name: Table.of(found, about[name]) for name, found in made.items() if found}


# ------------------------------------------------------------------------------------------------------ illusion panel
def illusion_rows(case: Case, values: Mapping[str, Tensor]) -> list[Row]:
    """What was exchanged and what it did: the subspace, its parts, what contains it, and random subspaces."""
    pairs = case.pairs
    rows: list[Row] = []
    first = next((values[name] for name in ("exchange", "containment", "reader_split") if name in values), None)
    if first is not None:
        rows.append(_part(case, "subspace", first[0]))
    if "reader_split" in values:
        split = pairs.read_space.split(case.subspace)
        bases = (split.row, split.null, split.span, split.row)
        for name, basis, observed in zip(PARTS, bases, values["reader_split"][1:], strict=True):
            if basis is not None:
                rows.append(_part(case, name, observed))
    if "containment" in values:
        for (name, _), observed in zip(pairs.containers, values["containment"][1:], strict=True):
            rows.append(_part(case, name, observed))
    for drawn in values["exchange"][1:-1] if "exchange" in values else ():
        share, flips = float(pairs.shares(drawn).mean()), float(pairs.flips(drawn).double().mean())
        rows.append(_row("random subspace", "null", (share, None), (flips, None)))
    return rows


def _part(case: Case, name: str, values: Tensor) -> Row:
    pairs = case.pairs
    share = pairs.share_of(values, seed=case.seed)
    return _row(name, "observed", share, pairs.rate_of(pairs.flips(values), seed=case.seed))


def _row(name: str, kind: str, share: tuple[float, Interval | None], flips: tuple[float, Interval | None]) -> Row:
    row: Row = {"part": name, "kind": kind}
    for column, (estimate, interval) in {"value": share, "flips": flips}.items():
        ends = (None, None) if interval is None else (interval.low, interval.high)
        before = "" if column == "value" else "flips_"
        row |= {column: estimate, f"{before}low": ends[0], f"{before}high": ends[1]}
    return row


# ----------------------------------------------------------------------------------------------------------- dormancy
def dormancy_rows(case: Case, values: Mapping[str, Tensor]) -> list[Row]:
    """Coordinates of both classes, natural and patched, where the dormancy of the actuator was checked."""
    at = coordinates(case) if "dormancy" in values else None
    if at is None:
        return []
    axes = _farthest(at)
    low, high = natural_range(at.natural)
    each = max(1, POINTS // (4 * len(axes)))
    rows: list[Row] = []
    for axis in axes:
        ends = {"low": float(low[axis]), "high": float(high[axis])}
        for state, states in (("natural", at.natural), ("patched", at.patched)):
            for label in (0, 1):
                own = states[at.labels == label, axis]
                draw = torch.randperm(len(own), generator=torch.Generator().manual_seed(case.seed))[:each]
                # a patched state imitates the class of its partner
                towards = label if state == "natural" else 1 - label
                what = {"coordinate": axis + 1, "state": state, "label": towards}
                for value in own[draw.sort().values].tolist():
                    rows.append({**what, "value": value, **ends})
    return rows


def _farthest(at: Coordinates) -> Sequence[int]:
    """The coordinates along which patched states lie farthest from the class they imitate, in its deviations."""
    worst = torch.zeros(at.natural.shape[1], dtype=torch.float64)
    for label in (0, 1):
        target, patched = at.natural[at.labels != label].double(), at.patched[at.labels == label].double()
        spread = target.std(0).clamp(min=1e-30)
        worst = torch.maximum(worst, (patched.mean(0) - target.mean(0)).abs() / spread)
    return worst.argsort(descending=True, stable=True)[:AXES].tolist()


# ----------------------------------------------------------------------------------------------------------- capacity
def capacity_rows(case: Case, values: Mapping[str, Tensor]) -> list[Row]:
    """What the whole state, the subspace and the best possible patch do: to first order, and where they were run."""
    if "capacity" not in values:
        return []
    pairs = case.pairs
    difference, gradient = pairs.difference.double(), pairs.path_gradients.double()
    whole = (difference * gradient).sum(1)
    inside = (pairs.within(case.subspace).double() * gradient).sum(1)
    predicted = {
        "subspace": inside,
        "whole state": whole,
        "best direction of each pair": whole + capacity(difference, gradient),
    }
    rows: list[Row] = []
    for patch, shares in predicted.items():
        found = mean_of(by_prompt(pairs, shares), pairs.prompts.groups, seed=case.seed)
        rows.append(_effect(patch, "first order", *found))
    runs = {"subspace": values["capacity"][0], "best subspace of its rank, held out": values["capacity"][1]}
    runs["whole state"] = values["capacity"][2]
    rows += [_effect(patch, "run", *pairs.share_of(run, seed=case.seed)) for patch, run in runs.items()]
    return rows


def _effect(patch: str, kind: str, value: float, interval: Interval) -> Row:
    return {"patch": patch, "kind": kind, "value": value, "low": interval.low, "high": interval.high}
