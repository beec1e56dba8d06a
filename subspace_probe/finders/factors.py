"""Several labels at once: the direction of each with the others held fixed, by one regression on all of them."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, SmallSampleWarning, unknown
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.designs import Design, cells_of
from subspace_probe.finders.factor_set import Factors, cosine_table
from subspace_probe.finders.fitting import Fitting
from subspace_probe.finders.levels import coded, principal_axes
from subspace_probe.finders.permuting import permuted_codes, require_enough
from subspace_probe.linalg.moments import class_moments
from subspace_probe.linalg.permutations import permutation_p

MOST_VALUES = 12
"""A factor with more values than this must be asked for by name: it may be a row number."""
CONDITION_BOUND = 10.0
"""Condition numbers above this warn: two balanced labels that agree in 99 % of the rows reach it."""


@final
@dataclass(frozen=True)
class FactorSubspaces:
    """One least-squares regression of the activations on the label and other factors together (main effects).

    Two labels that mostly agree share their mean differences: of orthogonal axes of equal norm, with balanced labels
    of correlation r, the differences have cosine 2 r / (1 + r^2), which is 0.994 where they agree in 95 % of the rows.
    The joint effects are the differences with the other factors held fixed, and keep the axes apart, as long as every
    combination of values that the comparison needs has prompts: harmful and harmless, refused and complied with.

    A binary factor gets a direction, scaled by its joint effect, that points to its larger value; one with m values
    gets the at most m - 1 axes of its effects. Found when the joint effect is larger than in 95 % of the permutations
    of the factor within the strata of all others. `fit` gives the label's direction, `fit_all` all of them.

    Each effect's variance grows with the square of the condition number of the design, which every result carries:
    sqrt((1 + r) / (1 - r)) for two balanced labels. Above 10 it warns.

    Args:
        factors: besides the label; () takes every factor that varies and is no copy of the label, each with at most 12
            values. The label's name is "label", or after `relabel` the name of the factor it came from.
        rank_tolerance: axes of a factor's effects narrower than this fraction of its widest are left out.
        null_draws: permutations behind `found`, for each factor; 0 skips the test.
        seed: of the permutations.
    """

    name: ClassVar[str] = "factors"
    cost: ClassVar[str] = "one pass, O(n d) per permutation"
    use: ClassVar[str] = "to keep apart labels that go together"

    factors: tuple[str, ...] = ()
    rank_tolerance: float = 1e-6
    null_draws: int = 99
    seed: int = 0

    def fit(self, acts: Activations, site: Site) -> Subspace:
        """The direction of the label with the factors held fixed.

        Raises:
            ConfigError: a factor with too many values that was not named.
            DataError: a class without rows, a factor with one value, or factors that cannot be told apart.
            ShapeError: non-finite activations.
            UnknownName: no such factor.
        """
        return self._fit(acts, site, tested=1).subspaces[label_name(acts.contrast)]

    def fit_all(self, acts: Activations, site: Site) -> Factors:
        """The subspaces of the label and all factors, from one regression; raises as `fit`."""
        return self._fit(acts, site)

    def permuted(self, acts: Activations, seed: int) -> Int[Tensor, " n"]:
        """The labels under the null that they do not matter: exchanged within the strata of the other factors."""
        codes = torch.stack([coded(values)[1] for _, values in self._columns(acts)], dim=1)
        return _within_strata(acts, codes, 0, seed)[:, 0]

    def _fit(self, acts: Activations, site: Site, tested: int | None = None) -> Factors:
        fitting = Fitting(self, acts, site)
        fitting.require_classes()
        columns = self._columns(acts)
        codes = torch.stack([coded(values)[1] for _, values in columns], dim=1)
        design, cell = Design.of(codes)
        design.require_full_rank(columns)
        condition = design.condition_number
        if condition > CONDITION_BOUND:
            warnings.warn(
                f"The design of {', '.join(name for name, _ in columns)} has condition number {condition:.1f}, above "
                f"{CONDITION_BOUND:g}: too few of {acts.rows.n} rows tell them apart, and the axes are uncertain. "
                "Add prompts on which they differ.",
                SmallSampleWarning,
                stacklevel=3,
            )
        nulls = [
            [_drawn(acts, codes, design, factor, self.seed + draw) for draw in range(self.null_draws)]
            for factor in range(len(columns) if tested is None else tested)
        ]
        for draws in nulls:
            if draws:
                require_enough(torch.stack([draw.cell for draw in draws]), self.name)
        means, sizes = _pass(fitting, cell, nulls)
        subspaces: dict[str, Subspace] = {}
        marginal: dict[str, Subspace] = {}
        for i, (name, values) in enumerate(columns):
            joint = self._subspace(fitting, design, design.joint_weights(i), means, i, name, values)
            null = sizes[i] if i < len(sizes) else sizes[0][:0]
            size = float(joint.notes["effect"])
            p = permutation_p(size, null, side="greater") if len(null) else float("nan")
            level = float(null.quantile(0.95)) if len(null) else None
            notes = {"factors": [n for n, _ in columns], "condition_number": condition, "p": p, "null_effect_95": level}
            found = joint.found and not p > 0.05
            subspaces[name] = replace(joint, found=found, notes={**joint.notes, **notes})
            marginal[name] = self._subspace(fitting, design, design.marginal_weights(i), means, i, name, values)
        return Factors(subspaces, marginal, condition, cosine_table(design, subspaces, marginal))

    def _subspace(
        self,
        fitting: Fitting,
        design: Design,
        weights: Float64[Tensor, "m cells"],
        means: Float64[Tensor, "cells d"],
        factor: int,
        name: str,
        values: Int[Tensor, " n"],
    ) -> Subspace:
        """The axes of a factor's effects, about the middle of them."""
        shares, centre = design.shares_of(factor), design.shares @ means
        # about the mean, so that a large common one cancels; the weights of a value add up to zero
        effects = weights @ (means - centre)
        size = float((effects.square().sum(dim=1) @ shares).sqrt())
        empty = size <= 1e-12 * (1 + float(centre.norm()))
        basis, scale = principal_axes(effects, shares, coded(values)[0], self.rank_tolerance)
        if empty:
            basis, scale = torch.eye(1, means.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return fitting.result(
            basis,
            scale,
            centre + effects.mean(dim=0),
            found=not empty,
            orientation=f"towards larger values of {name}",
            notes={"factor": name, "effect": size},
        )

    def _columns(self, acts: Activations) -> list[tuple[str, Int[Tensor, " n"]]]:
        """The label and the factors, by name; the label first."""
        own, given = label_name(acts.contrast), acts.contrast.factors
        for name in self.factors:
            if name not in given or name == own:
                raise unknown("factor besides the label", name, [n for n in given if n != own])
        names = self.factors or _varying(acts.contrast, own)
        columns = [(own, acts.labels), *((name, acts.factor(name)) for name in names)]
        for name, values in columns[1:]:
            if len(values.unique()) < 2:
                raise DataError(
                    f"factors was asked for {name!r}, which has the one value {int(values[0])} in all {len(values)} "
                    "rows. Leave it out, or add prompts with other values."
                )
        return columns


def label_name(contrast: Contrast) -> str:
    """What the label is called among the factors: "label", or after `relabel` the factor that it is a copy of.

    Raises:
        ConfigError: a factor of the name "label" that is not the label, and no factor that is.
    """
    if contrast.factors.get("label", contrast.labels) == contrast.labels:
        return "label"
    relabelled = contrast.name.rpartition("/")[2]  # still there after labels were permuted
    for name, values in contrast.factors.items():
        if name == relabelled or values == contrast.labels:
            return name
    raise ConfigError(
        f"{contrast.name!r} has a factor named 'label' that differs from its labels, so that neither can be named. "
        "Give the factor another name."
    )


def _varying(contrast: Contrast, own: str) -> tuple[str, ...]:
    """Every factor that could be meant: it varies, and is no copy of the label or of one before it."""
    names: dict[tuple[int, ...], str] = {contrast.labels: own}
    for name, values in contrast.factors.items():
        if len(set(values)) > 1:
            names.setdefault(values, name)
    many = {name: len(set(values)) for values, name in names.items() if len(set(values)) > MOST_VALUES}
    if many:
        listed = ", ".join(f"{name} ({count} values)" for name, count in many.items())
        few = tuple(name for name in names.values() if name != own and name not in many)
        raise ConfigError(
            f"factors was not told which factors to use, and {contrast.name!r} has some that look like row numbers: "
            f"{listed}. Name those you want, such as FactorSubspaces(factors={few})."
        )
    return tuple(name for name in names.values() if name != own)


def _within_strata(acts: Activations, codes: Int[Tensor, "n f"], factor: int, seed: int) -> Int[Tensor, "n f"]:
    """The codes with one factor permuted where all others agree, as pairs and groups allow."""
    others = torch.cat([codes[:, :factor], codes[:, factor + 1 :]], dim=1)
    strata = others.unique(dim=0, return_inverse=True)[1] if others.shape[1] else torch.zeros_like(codes[:, 0])
    out = codes.clone()
    out[:, factor] = permuted_codes(acts, codes[:, factor], seed=seed, strata=strata)
    return out


@final
@dataclass(frozen=True, eq=False)
class _Draw:
    """One permutation of a factor: which weights each row has in the effects of its values."""

    cell: Int[Tensor, " n"]
    weights: Float64[Tensor, "m cells"]
    shares: Float64[Tensor, " m"]


def _drawn(acts: Activations, codes: Int[Tensor, "n f"], given: Design, factor: int, seed: int) -> _Draw:
    permuted = _within_strata(acts, codes, factor, seed)
    cells, cell, counts = cells_of(permuted)
    # rows that move alone leave the design as it was; groups of unequal size do not
    same = torch.equal(cells, given.cells) and torch.equal(counts, given.counts)
    design = given if same else Design.of(permuted)[0]
    return _Draw(cell.int(), design.joint_weights(factor) / design.counts, design.shares_of(factor))


def _pass(
    fitting: Fitting, cell: Int[Tensor, " n"], nulls: Sequence[Sequence[_Draw]]
) -> tuple[Float64[Tensor, "cells d"], list[Float64[Tensor, " draws"]]]:
    """The mean of each cell, and the size of every permuted effect, in one reading of the rows."""
    draws = [draw for factor in nulls for draw in factor]
    heights = [len(draw.shares) for draw in draws]
    effects = torch.zeros(sum(heights), fitting.width, dtype=torch.float64)

    def watched() -> Iterator[tuple[Float[Tensor, "b d"], Int[Tensor, " b"]]]:
        start = 0
        for block, _ in fitting.batches():
            stop = start + len(block)
            if draws:
                weights = torch.cat([draw.weights[:, draw.cell[start:stop]] for draw in draws])
                effects.add_(weights @ block.to("cpu", torch.float64))
            yield block, cell[start:stop]
            start = stop

    moments = class_moments(watched(), fitting.width)
    sizes = [
        float((part.square().sum(dim=1) @ draw.shares).sqrt())
        for part, draw in zip(effects.split(heights) if draws else (), draws, strict=True)
    ]
    split = torch.tensor(sizes, dtype=torch.float64).split([len(factor) for factor in nulls])
    return torch.stack([moments[c].mean for c in sorted(moments)]), list(split)
