"""What a joint fit of several factors gives: their subspaces, how they compare, and what leaks from one to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import unknown
from subspace_probe.core.reports import Table
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.designs import Design
from subspace_probe.finders.folds import group_folds
from subspace_probe.finders.levels import coded
from subspace_probe.linalg.angles import principal_angles
from subspace_probe.linalg.bases import complement, orthonormalise
from subspace_probe.linalg.ranking import auroc

RESIDUAL = "residual"


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """The subspaces of several factors of one site.

    Attributes:
        subspaces: by factor, the axes of its effects with the other factors held fixed.
        marginal: the same from each factor's means alone, the others ignored: for comparison, untested.
        condition_number: of the standardised design; 1 where the factors are independent of each other.
        cosines: one row a pair of factors: their correlation in the data, and the cosine of their joint and of their
            marginal subspaces; signed between directions, else that of the smallest principal angle.
    """

    subspaces: dict[str, Subspace]
    marginal: dict[str, Subspace]
    condition_number: float
    cosines: Table

    @property
    def residual(self) -> Subspace | None:
        """Everything orthogonal to all subspaces, of rank d - k with steps of one; None where nothing is left."""
        first = next(iter(self.subspaces.values()))
        stack = self._stack()
        if len(stack) >= first.width:
            return None
        basis = complement(stack).float() if len(stack) else torch.eye(first.width)
        return Subspace(
            basis, torch.ones(len(basis)), first.origin, first.site, first.where, notes={"factor": RESIDUAL}
        )

    def swap(self, x_from: Float[Tensor, "*b d"], x_to: Float[Tensor, "*b d"], factor: str) -> Float[Tensor, "*b d"]:
        """`x_to` with what it holds of one factor replaced by what `x_from` holds of it.

        The amount is read jointly: what two states differ by is written as a sum over all subspaces, and only the
        part in this factor's is moved, so that axes that are not orthogonal do not disturb each other.

        Raises:
            UnknownName: no such factor.
        """
        if factor not in self.subspaces:
            raise unknown("factor", factor, self.subspaces)
        subspace = self.subspaces[factor]
        if _blank(subspace):
            return x_to
        bases = {name: s.basis.to(x_to.device).double() for name, s in self.subspaces.items() if not _blank(s)}
        amounts = (x_from - x_to).double() @ torch.linalg.pinv(torch.cat(list(bases.values())))
        sizes = [len(basis) for basis in bases.values()]
        own = dict(zip(bases, amounts.split(sizes, dim=-1), strict=True))[factor]
        return (x_to.double() + own @ bases[factor]).to(x_to.dtype)

    def leakage(self, acts: Activations, site: Site, *, folds: int = 5) -> Table:
        """How well each factor can be read from the coordinates in each factor's subspace, and from what is left.

        Cross-validated logistic regression that keeps pairs and groups in one fold. Where factors go together in the
        data, one must leak into the other's subspace: `by_design` is what a probe gets that knows the first factor's
        value and nothing else. Leakage is what exceeds it. Give rows that the fit has not seen.

        Returns:
            One row for each subspace (and "residual") and factor: balanced `accuracy`, its `chance`, `by_design`, and
            the `auroc` of binary factors (chance 0.5).
        """
        x = acts.at(site).to("cpu", torch.float64)
        features = {name: subspace.coords(x) for name, subspace in self.subspaces.items()}
        stack = orthonormalise(self._stack())
        features[RESIDUAL] = x - (x - x.mean(dim=0)) @ stack.T @ stack
        values = {name: _values(acts, name) for name in self.subspaces}
        rows: list[dict[str, Any]] = []
        for subspace, coordinates in features.items():
            for factor, codes in values.items():
                fold = group_folds(codes, acts.pairs, acts.groups, most=folds)
                accuracy, area = _probed(coordinates, codes, fold)
                known = values.get(subspace)
                row = {
                    "subspace": subspace,
                    "factor": factor,
                    "accuracy": accuracy,
                    "chance": 1 / (int(codes.max()) + 1),
                }
                hot = None if known is None else torch.nn.functional.one_hot(known).double()
                row["by_design"] = None if hot is None else _probed(hot, codes, fold)[0]
                rows.append({**row, "auroc": area})
        return Table.of(rows, "how well a factor can be read from the coordinates in a factor's subspace")

    def _stack(self) -> Float64[Tensor, "k d"]:
        width = next(iter(self.subspaces.values())).width
        rows = [s.basis.double() for s in self.subspaces.values() if not _blank(s)]
        return torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def cosine_table(design: Design, joint: Mapping[str, Subspace], marginal: Mapping[str, Subspace]) -> Table:
    """Joint and marginal cosines of all pairs of factors, side by side."""
    names = list(joint)
    rows = [
        {
            "factor": a,
            "other": b,
            "correlation": design.correlation(i, j),
            "joint": _cosine(joint[a], joint[b]),
            "marginal": _cosine(marginal[a], marginal[b]),
        }
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    ]
    return Table.of(rows, "cosines between the subspaces of two factors")


def _cosine(a: Subspace, b: Subspace) -> float | None:
    if _blank(a) or _blank(b):
        return None
    if a.rank == b.rank == 1:
        return a.cosine(b)
    return float(principal_angles(a.basis.double(), b.basis.double())[0].cos())


def _blank(subspace: Subspace) -> bool:
    """No effect at all was measured; its basis stands for nothing."""
    return not bool(subspace.scale.any())


def _values(acts: Activations, name: str) -> Int[Tensor, " n"]:
    """Codes of a factor; "label" is no factor unless the contrast was relabelled.

    Raises:
        UnknownName: a factor that these prompts do not have.
    """
    known = name in acts.contrast.factors or name != "label"
    return coded(acts.factor(name) if known else acts.labels)[1]


def _probed(
    x: Float64[Tensor, "n k"], codes: Int[Tensor, " n"], fold: Int[Tensor, " n"]
) -> tuple[float | None, float | None]:
    """Balanced accuracy, and for two values the AUROC, as means over folds; None where nothing can be held out."""
    from sklearn.linear_model import LogisticRegression

    spread = x.std(dim=0, correction=0)
    x = (x - x.mean(dim=0)) / torch.where(spread > 0, spread, 1.0)
    hits: list[float] = []
    areas: list[float] = []
    for held in range(int(fold.max()) + 1):
        out = fold == held
        if min(len(codes[out].unique()), len(codes[~out].unique())) <= int(codes.max()):
            continue  # a value is missing on one side
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(x[~out].numpy(), codes[~out].numpy())
        said = torch.from_numpy(model.predict(x[out].numpy()))
        right = [float((said == code)[codes[out] == code].double().mean()) for code in range(int(codes.max()) + 1)]
        hits.append(sum(right) / len(right))
        if int(codes.max()) == 1:
            areas.append(auroc(torch.from_numpy(model.decision_function(x[out].numpy())), codes[out]))
    return tuple(sum(part) / len(part) if part else None for part in (hits, areas))  # pyright: ignore[reportReturnType]
