"""Subspaces whose label is known: illusory, faithful, inflated. What checks of mechanism are measured on.

Labels come from how a model was built and from exchanging whole states with plain hooks (``exchanging``), not from any
check that is to be measured. A case is *certified* when, on held-out minimal pairs and over the whole vocabulary,

- illusory: the direction changes at least .8 of the answers, the whole state of that site less than .2. Planted by the
  dormant gadget (``gadgets``) or its residual kin (``residual_gadgets``), or trained (``DAS``) at the site of one.
- faithful: at a residual state that changes at least .8 as a whole, so does the direction: the planted vector of an
  organism, the difference of class means, or DAS. Or at the gadget's faithful twin: the MLP as a whole and the
  direction change at least half, and a trained direction not more than the whole by over .2, else it is inflated.
- inflated: the whole MLP changes between a quarter and three quarters, the trained direction at least .8: neither. At
  an MLP as it was trained, or at a twin whose neurons write less than the class gap.

Every model also has to answer at least .97 of its prompts right. The two sets, for calibration and for what is
reported, share no organism, so no weights, no gadget and no seed (``illusion_cells``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, NamedTuple, final

from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.finders.das import DAS
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import language_of, load_truth
from subspace_probe.organisms.exchanging import Exchange, oriented
from subspace_probe.organisms.gadgets import Gadget, plant_gadget
from subspace_probe.organisms.illusion_cells import CARRIERS, HOSTS, PARTIAL, SILENT, Bench, benches
from subspace_probe.organisms.residual_gadgets import plant_residual_gadget

Label = Literal["illusory", "faithful", "inflated", "unused", "entangled"]
RIGHT: Final = 0.97
STRONG, WEAK = 0.8, 0.2
METRIC: Final = "logit_difference"


@final
class _Recipe(NamedTuple):
    """How a gadget is built; see `plant_gadget`."""

    neurons: int
    kappa: float
    sigma: float = 0.0
    leak: float = 0.0


_RECIPES: Final = (_Recipe(16, 1.5), _Recipe(8, 1.7, sigma=0.03), _Recipe(32, 2.0), _Recipe(12, 1.5, 0.03, leak=0.05))
_TWINS: Final = (_Recipe(16, 1.5), _Recipe(8, 2.0))
_WEAK_TWINS: Final = (_Recipe(16, 0.7), _Recipe(16, 1.2))
_SEEDS: Final = {False: 1000, True: 0}
_STEPS: Final = 40
_LONG: Final = 150
_RESIDUAL: Final = 4
_N_DAS: Final = 96


@final
@dataclass(frozen=True, eq=False)
class LabelledSubspace:
    """A subspace of which it is known whether the model uses it.

    Attributes:
        name: organism, prompts, token, block, and what it is.
        kind: how it was made: planted, das, mean_difference, lda, ...
        model: the model it is of, with the gadget where there is one.
        site: where; `where`: at which token.
        pairs: held-out minimal pairs, both labels, with answers.
        metric: name of the metric that tells the two sides of a pair apart.
        label: illusory, faithful, inflated; unused (readable, not used); entangled (with another skill).
        certificate: the numbers behind the label: interchange accuracies of the `direction` and the `whole` state,
            share answered `right`, number of prompts `n`, and a gadget's own.
        certified: whether they meet the label's bounds; builders leave out what does not, unless asked.
        skill: of an entangled subspace, prompts of the skill that goes with it.
    """

    name: str
    kind: str
    model: HookedModel
    subspace: Subspace
    site: Site
    where: Where
    pairs: Contrast
    metric: str
    label: Label
    certificate: dict[str, float]
    certified: bool
    skill: Contrast | None = None


def illusory_cases(
    *, calibration: bool = False, limit: int | None = None, failed: bool = False
) -> Iterator[LabelledSubspace]:
    """Directions that change answers through a dormant gadget: the planted one and one trained at the same site.

    Args:
        calibration: those to set margins on, of other organisms than those to report.
        limit: stop after so many; a few are of different cells.
        failed: also give those that miss their certificate, to count them.
    """
    return _chosen(_illusory(calibration), limit, failed=failed)


def faithful_cases(
    *, calibration: bool = False, limit: int | None = None, failed: bool = False
) -> Iterator[LabelledSubspace]:
    """Directions that carry the variable: at residual states, and at the gadget's faithful twin. Arguments as above."""
    return _chosen(_faithful(calibration), limit, failed=failed)


def inflated_cases(
    *, calibration: bool = False, limit: int | None = None, failed: bool = False
) -> Iterator[LabelledSubspace]:
    """Directions trained at MLPs that carry part of the variable, and do more than they. Arguments as above."""
    return _chosen(_inflated(calibration), limit, failed=failed)


def _chosen(cases: Iterator[LabelledSubspace], limit: int | None, *, failed: bool) -> Iterator[LabelledSubspace]:
    return islice((case for case in cases if failed or case.certified), limit)


def _illusory(calibration: bool) -> Iterator[LabelledSubspace]:
    for number, bench in benches(HOSTS[calibration], rounds=len(_RECIPES)):
        seed = _SEEDS[calibration] + number
        model, gadget = _planted(bench, seed, _RECIPES[number], faithful=False)
        held = Exchange(model, bench.test, bench.cell.where)
        trained = _das(model, bench, gadget.direction.site, seed)
        for kind, subspace in (("planted", gadget.direction), ("das", trained)):
            found = certificate_of(held, subspace) | gadget.numbers
            yield case_of(bench, model, subspace, f"gadget, {kind} #{seed}", "illusory", found, _illusion(found))
    for number, bench in benches(SILENT[calibration], rounds=_RESIDUAL):
        seed = _SEEDS[calibration] + 300 + number
        model, gadget = plant_residual_gadget(bench.model, bench.fitted, bench.cell.layer, bench.cell.where, seed=seed)
        held = Exchange(model, bench.test, bench.cell.where)
        trained = _das(model, bench, gadget.direction.site, seed, steps=2 * _STEPS)
        for kind, subspace in (("planted", gadget.direction), ("das", trained)):
            found = certificate_of(held, subspace) | gadget.numbers
            yield case_of(
                bench, model, subspace, f"residual gadget, {kind} #{seed}", "illusory", found, _illusion(found)
            )


def _illusion(found: dict[str, float]) -> bool:
    return found["right"] >= RIGHT and found["direction"] >= STRONG and found["whole"] < WEAK


def _faithful(calibration: bool) -> Iterator[LabelledSubspace]:
    for number, bench in benches(CARRIERS[calibration], rounds=2):
        site, seed = Site(bench.cell.layer), _SEEDS[calibration] + number
        found = [("das", _das(bench.model, bench, site, seed))]
        if number == 0:
            found += [("mean_difference", mean_difference(bench, site)), *planted_vectors_at(bench, site)]
        for kind, subspace in found:
            certificate = certificate_of(bench.held, subspace)
            good = min(certificate["whole"], certificate["direction"]) >= STRONG and certificate["right"] >= RIGHT
            yield case_of(bench, bench.model, subspace, f"residual, {kind} #{seed}", "faithful", certificate, good)
    for number, bench in benches(HOSTS[calibration], rounds=len(_TWINS)):
        seed = _SEEDS[calibration] + 500 + number
        model, gadget = _planted(bench, seed, _TWINS[number], faithful=True)
        held = Exchange(model, bench.test, bench.cell.where)
        trained = _das(model, bench, gadget.direction.site, seed)
        for kind, subspace in (("planted", gadget.direction), ("das", trained)):
            certificate = certificate_of(held, subspace) | gadget.numbers
            good = min(certificate["whole"], certificate["direction"]) >= 0.5 and certificate["right"] >= RIGHT
            good = good and certificate["direction"] <= certificate["whole"] + WEAK
            yield case_of(bench, model, subspace, f"twin, {kind} #{seed}", "faithful", certificate, good)


def _inflated(calibration: bool) -> Iterator[LabelledSubspace]:
    for _, bench in benches(PARTIAL[calibration]):
        seed = _SEEDS[calibration]
        subspace = _das(bench.model, bench, Site(bench.cell.layer, "mlp_post"), seed, steps=_LONG)
        yield _half(bench, bench.model, bench.held, subspace, f"MLP, das #{seed}", {})
    for number, bench in benches(HOSTS[calibration], rounds=len(_WEAK_TWINS)):
        seed = _SEEDS[calibration] + 200 + number
        model, gadget = _planted(bench, seed, _WEAK_TWINS[number], faithful=True)
        subspace = _das(model, bench, gadget.direction.site, seed)
        held = Exchange(model, bench.test, bench.cell.where)
        yield _half(bench, model, held, subspace, f"weak twin, das #{seed}", gadget.numbers)


def _half(
    bench: Bench, model: HookedModel, held: Exchange, subspace: Subspace, name: str, more: dict[str, float]
) -> LabelledSubspace:
    found = certificate_of(held, subspace) | more
    good = 0.25 <= found["whole"] <= 0.75 and found["direction"] >= STRONG and found["right"] >= RIGHT
    return case_of(bench, model, subspace, name, "inflated", found, good)


def _planted(bench: Bench, seed: int, recipe: _Recipe, *, faithful: bool) -> tuple[HookedModel, Gadget]:
    return plant_gadget(
        bench.model, bench.fitted, bench.cell.layer, bench.cell.where,
        **recipe._asdict(), faithful=faithful, seed=seed,
    )  # fmt: skip


def _das(model: HookedModel, bench: Bench, site: Site | None, seed: int, *, steps: int = _STEPS) -> Subspace:
    """One short training, from the linearised optimum, without controls: what it finds is judged by the certificate."""
    das = DAS(steps=steps, restarts=0, controls=(), holdout=0.2, seed=seed)
    train = bench.train.first_pairs(_N_DAS // 2)
    return das.fit(model, train, site or Site(bench.cell.layer), bench.cell.where)


def mean_difference(bench: Bench, site: Site) -> Subspace:
    states, labels = bench.fitted.states(site.stream, site.layer), bench.fitted.labels
    return along(bench, site, states[labels == 1].mean(0) - states[labels == 0].mean(0), "mean_difference")


def along(bench: Bench, site: Site, vector: Tensor, finder: str) -> Subspace:
    """The direction of a vector, with the gap of the train states along it."""
    states = bench.fitted.states(site.stream, site.layer)
    return oriented(
        vector, states, bench.fitted.labels, model=bench.model, site=site, where=bench.cell.where, finder=finder
    )


def planted_vectors_at(bench: Bench, site: Site) -> list[tuple[str, Subspace]]:
    """The organism's planted vector, where this cell is its place."""
    if language_of(bench.cell.organism) == "guarding":
        return []
    names = {"harmfulness": ("harmfulness", "judgement"), "refusal": ("harmfulness", "refused"), "intent": ("knob",)}
    return [
        ("planted", along(bench, site, planted.vector, "planted"))
        for planted in load_truth(bench.cell.organism).variables
        if planted.site == site
        and bench.cell.contrast in names[planted.name]
        and (str(planted.where) == "t_inst") == (str(bench.cell.where) == "t_inst")
    ]


def certificate_of(held: Exchange, subspace: Subspace) -> dict[str, float]:
    if subspace.site is None:
        raise RuntimeError("every direction here is of a site")
    return {
        "direction": held.flips(subspace.site, subspace.basis),
        "whole": held.flips(subspace.site),
        "right": held.right(),
        "n": float(held.moving.sum()),
    }


def case_of(
    bench: Bench, model: HookedModel, subspace: Subspace, name: str, label: Label, certificate: dict[str, float],
    certified: bool,
) -> LabelledSubspace:  # fmt: skip
    if subspace.site is None:
        raise RuntimeError("every direction here is of a site")
    return LabelledSubspace(
        f"{bench.cell}: {name}", str(subspace.notes["finder"]), model, subspace, subspace.site, bench.cell.where,
        bench.test, METRIC, label, certificate, certified,
    )  # fmt: skip
