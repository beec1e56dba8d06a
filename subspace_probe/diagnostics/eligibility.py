"""May a layer be a target? Only where what is to be rerouted can be read well, on prompts that were not fitted on.

A target at a layer whose probe is weak can always be met, and meeting it says nothing about behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.protocols import Finder
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.finders.linear_probe import LinearProbe
from subspace_probe.interventions.targets import HalfSpace

LEAST = 0.95
"""Cross-validated accuracy that makes a layer a target."""
DRAWS = 39
"""Label permutations: enough for p = 0.025."""


@final
@dataclass(frozen=True)
class Eligibility:
    """How well the class is read at a site, and whether that is enough.

    Attributes:
        accuracy: balanced, mean over folds that keep pairs and groups together; NaN where no fold could be scored.
        p: of the probe's AUROC against labels permuted as pairs and groups allow.
        folds: of the cross-validation.
        least: accuracy that is asked for.
        most_p: p that is allowed.
    """

    site: Site
    accuracy: float
    p: float
    folds: int
    n: int
    least: float = LEAST
    most_p: float = 0.05

    @property
    def eligible(self) -> bool:
        """Whether both hold."""
        return self.accuracy >= self.least and self.p <= self.most_p

    @property
    def reading(self) -> str:
        """The two numbers in words."""
        return f"cross-validated accuracy {self.accuracy:.3f} (needs {self.least:g}), permutation p {self.p:.3f}"

    def require(self) -> None:
        """Check that it may be a target.

        Raises:
            ConfigError: it may not, and why.
        """
        if not self.eligible:
            raise ConfigError(
                f"{self.site.short} cannot be a target: {self.reading}, {self.n} states in {self.folds} folds. A "
                "target that is badly read can be met without any change of behaviour. Take a layer that is read "
                "better, or add prompts; with ineligible='flag' it is listed and left out."
            )


def eligibility(
    acts: Activations, site: Site, *, least: float = LEAST, draws: int = DRAWS, folds: int = 5, seed: int = 0
) -> Eligibility:
    """Cross-validate a linear probe at one site.

    Args:
        acts: states of both classes.
        least: accuracy that makes the site a target.
        draws: label permutations behind p.
        folds: of the cross-validation, at most.

    Raises:
        SiteError: a site that was not captured.
        DataError: a class with fewer than two rows.
        ConfigError: no permutations, or a share that is none.
    """
    if draws < 1 or not 0 <= least <= 1:
        raise ConfigError(
            f"Eligibility was asked for with least={least} and draws={draws}. The accuracy lies between 0 and 1, and "
            "p takes at least one permutation."
        )
    notes = LinearProbe(folds=folds, null_draws=draws, seed=seed).fit(acts, site).notes
    accuracy, p = notes["cv_accuracy"], notes["p"]
    return Eligibility(
        site,
        accuracy=float("nan") if accuracy is None else float(accuracy),
        p=1.0 if p is None else float(p),
        folds=int(notes["folds"]),
        n=acts.rows.n,
        least=least,
    )


def target_from(subspace: Subspace, acts: Activations, *, label: int = 1) -> HalfSpace:
    """Where states of one class are to be taken along a direction: to the mean score of the other class.

    Args:
        subspace: a direction with a threshold, whose positive side is label 1.
        acts: clean states of both classes, at the direction's site.
        label: the class that is rerouted.

    Raises:
        ConfigError: another label than 0 and 1.
        RankError: more than one direction.
        DataError: no states of the other class.
    """
    if label not in (0, 1):
        raise ConfigError(f"Prompts of label {label} were to be rerouted. Labels are 0 and 1.")
    site = subspace.site or acts.sites[0]
    side = HalfSpace.of(subspace, side=-1 if label else 1)
    there = acts.at(site)[acts.labels != label]
    if not len(there):
        raise DataError(f"There are no states of label {1 - label}, to which states could be taken. Add prompts.")
    return replace(side, margin=float(side.score(there).double().mean()), site=site, where=acts.where)


def targets_of(acts: Activations, finder: Finder, sites: Sequence[Site], *, label: int = 1) -> list[HalfSpace]:
    """The target of every site, along the direction that a finder finds there; see `target_from`.

    Args:
        acts: clean states of both classes.
        finder: of a direction with a threshold, such as a mean difference or a linear probe.
        label: the class that is rerouted.
    """
    return [target_from(finder.fit(acts, site), acts, label=label) for site in sites]
