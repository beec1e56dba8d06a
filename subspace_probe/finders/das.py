"""Distributed alignment search: the subspace whose exchange makes a base prompt answer as its source would.

Geiger et al. 2024, arXiv:2303.02536; Wu et al. 2023, arXiv:2305.08809 (a learned boundary). Success is no evidence
by itself: DAS also fits arbitrary labels and untrained networks (Arora et al. 2024, arXiv:2402.12560), so both are
trained at the same budget and stand beside the result.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, RankError
from subspace_probe.core.keys import content_key
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.finders.interchange import Change, Interchange, unchanged, whole, within
from subspace_probe.finders.interchange_training import Schedule, Trained, linearised, train
from subspace_probe.linalg.angles import principal_angles
from subspace_probe.linalg.resampling import wilson_interval
from subspace_probe.models.hooked import HookedModel
from subspace_probe.models.reinitialised import reinitialised

Control = Literal["labels", "weights"]
_REFERENCES: Final[dict[str, Change]] = {"floor": unchanged, "full": whole}
"""Exchanging nothing, and the whole state."""
_RANDOM = 8
"""Random subspaces of the same rank, of which the best is shown."""
LEAST_ROWS = 16
"""Fewest prompts that can be divided into some to train on and some to judge by."""


@final
@dataclass(frozen=True)
class DAS:
    """Trained interchange: the subspace whose exchange carries the label from source to base (Geiger et al. 2024).

    Needs prompts with answers: under its own label a prompt says `answer`, under the other what its partner in the
    minimal pair says, or its `foil`. Trained on some groups of prompts, judged on the others by interchange accuracy
    (the wanted token is the most likely of the whole vocabulary): over pairs whose answer the exchange should change
    (`iia`, as published), over those it should keep, and over both. It counts as found when the interval of the last
    lies above those of both controls, of random subspaces of the same rank and of exchanging nothing, and arbitrary
    labels are not fitted as well on the training prompts either. Every control is trained from as many starts of its
    own. Intervals count prompts joined by a pair or a group as one.

    All arms, restarts and control labels alike, are trained in the same passes. Kept in memory: the state of every
    training prompt in front of the site, with keys and values of the layers above.

    Args:
        rank: dimension k; with a boundary the largest.
        steps: of Adam, its rate falling linearly to a tenth.
        batch_size: bases a step. Lower it when memory is short: a pass holds so many for every arm.
        lr: about the angle, in radians, that a row turns in the first step.
        restarts: random starts beside the linearised one.
        opposite: also start where the exchange does least to first order. A model that is sure of its answer is flat
            around it, and there the gradient may point away from what a whole exchange does.
        same: share of sources of the base's own label, whose exchange should change nothing.
        boundary: weight of a penalty on the rank, which is then trained too; no boundary by default.
        holdout: share of the prompts, by group, that it is judged on.
        controls: "labels" (sources with arbitrary labels) and "weights" (a re-initialised copy of the model).
        weight_decay: must be 0. On rows that are orthonormal it does nothing good, and in the usual parametrisation
            (Householder reflections) one step of it makes the basis zero.
        seed: of the split, the starts, the sources and the control labels.
    """

    name: ClassVar[str] = "das"
    cost: ClassVar[str] = "steps x (restarts + 1) passes above the site, twice that again for the controls"
    use: ClassVar[str] = "you have prompts with answers and ask which subspace *carries* the variable"

    rank: int = 1
    steps: int = 200
    batch_size: int = 32
    lr: float = 0.1
    restarts: int = 3
    opposite: bool = False
    same: float = 0.25
    boundary: float | None = None
    holdout: float = 0.3
    controls: tuple[Control, ...] = ("labels", "weights")
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight_decay:
            raise ConfigError(
                f"weight_decay={self.weight_decay} was given. An orthonormal basis must not be shrunk: decay changes "
                "only the rate at which it turns, and destroys Householder parametrisations. Leave it at 0."
            )
        wrong = [name for name in self.controls if name not in get_args(Control)]
        if wrong or not (self.rank >= 1 and self.steps >= 1 and self.batch_size >= 1 and self.restarts >= 0):
            raise ConfigError(
                f"DAS(rank={self.rank}, steps={self.steps}, batch_size={self.batch_size}, restarts={self.restarts}, "
                f"controls={self.controls}) was asked for. Counts are at least 1 (restarts 0); controls are among "
                f"{', '.join(get_args(Control))}."
            )
        if not (0 <= self.same < 1 and self.lr > 0 and (self.boundary is None or self.boundary >= 0)):
            raise ConfigError(
                f"DAS(same={self.same}, lr={self.lr}, boundary={self.boundary}) was asked for. It takes "
                "0 <= same < 1, lr > 0 and boundary >= 0."
            )

    @property
    def _arms(self) -> int:
        """Starts for every kind of labels."""
        return 1 + self.opposite + self.restarts

    def fit(
        self, model: HookedModel, contrast: Contrast, site: Site, where: Where, *, progress: bool = False
    ) -> Subspace:
        """Train, judge and compare with the controls.

        Raises:
            ConfigError: an encoder.
            DataError: prompts without answers, a missing class, too few groups, an exchange that could change nothing.
            PositionError: more than one token a prompt.
            RankError: more dimensions than the site has.
            SiteError: nothing that is computed from this state reaches the answer.
        """
        contrast.require_both_classes()
        # in an order of their own, so that the order in which prompts were given changes nothing
        contrast = contrast.take(sorted(range(len(contrast)), key=lambda row: content_key(contrast.prompts[row])))
        if model.spec.encoder:
            raise ConfigError(f"{model.spec.family} is an encoder and has no next token to answer with.")
        if self.rank > (width := model.backend.width(site)):
            raise RankError(f"Rank {self.rank} was asked for at {site.short}, which is {width} wide. Lower the rank.")
        parts = _divided(contrast, self.holdout, self.seed)
        task, test = _tasks(self, model, contrast, site, where, parts)
        if not bool((task.answers[:, 0] != task.answers[:, 1]).any()):
            raise DataError(f"No prompt of {contrast.name!r} answers otherwise under its other label. Give foils.")
        true = torch.tensor(contrast.labels).repeat(self._arms, 1)
        labels = torch.cat([true, _arbitrary(true, self.seed + 1)]) if "labels" in self.controls else true
        start = self._starts(task, labels)
        schedule = Schedule(self.steps, self.lr, self.same, self.boundary, self.seed)
        trained = train(schedule, task, labels, start, progress=progress)
        losses = judged(task, within(*trained), labels, self.seed)["loss"][: len(true)]
        best = int(losses.argmin())
        results = self._shares(task, test, trained, labels, best)
        results |= {name: judged(test, change, true[:1], self.seed)["all"][0] for name, change in _REFERENCES.items()}
        results["linearised"] = judged(test, within(start[:1]), true[:1], self.seed)["all"][0]
        drawn = self._random(len(trained.frame(best)), start, _RANDOM)
        results["random"] = _largest(judged(test, within(drawn), true[:1].repeat(_RANDOM, 1), self.seed)["all"])
        if "weights" in self.controls:
            fresh = _tasks(self, reinitialised(model, seed=self.seed), contrast, site, where, parts)
            bare = train(schedule, fresh[0], true, self._starts(fresh[0], true), progress=progress)
            results["control_weights"] = _largest(judged(fresh[1], within(*bare), true, self.seed)["all"])
        results |= {"train_losses": losses.tolist(), **_agreement(trained, len(true))}
        return self._result(task, trained.frame(best), results, model.provenance(contrast))

    def _shares(
        self, task: Interchange, test: Interchange, trained: Trained, labels: Tensor, best: int
    ) -> dict[str, Any]:
        """Accuracies of the best arm, and of the best of those with arbitrary labels."""
        true = self._arms
        held = judged(test, within(*trained), labels, self.seed)
        seen = judged(task, within(*trained), labels, self.seed)
        found = {"accuracy": held["all"][best], "iia": held["changed"][best], "kept": held["kept"][best]}
        found["train_accuracy"] = seen["all"][best]
        if len(labels) > true:
            found["control_labels"] = _largest(held["all"][true:])
            found["control_labels_train"] = _largest(seen["all"][true:])
        return found

    def _starts(self, task: Interchange, labels: Int[Tensor, "arm n"]) -> Float[Tensor, "arm k d"]:
        """For every kind of labels the same number of arms: its own linearised optima, then random starts."""
        kinds: list[Tensor] = []
        for first in range(0, len(labels), self._arms):
            ends = (False, True) if self.opposite else (False,)
            best = torch.stack(
                [linearised(task, self.rank, labels=labels[first], least=least, seed=self.seed) for least in ends]
            )
            kinds.append(torch.cat([best, self._random(self.rank, best, self.restarts)]))
        return torch.cat(kinds)

    def _random(self, rank: int, like: Float[Tensor, "arm k d"], draws: int) -> Float[Tensor, "draw m d"]:
        """Random orthonormal rows."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(draws, rank, like.shape[-1], generator=generator).to(like)
        return torch.linalg.qr(drawn.mT)[0].mT

    def _result(
        self, task: Interchange, frame: Tensor, results: dict[str, Any], provenance: dict[str, str]
    ) -> Subspace:
        """The subspace, its rows turned to the principal axes of the states' coordinates in it."""
        basis = frame.double()
        states, labels = task.states.double().cpu()[task.bases], task.labels[task.bases]
        basis = torch.linalg.svd((states - states.mean(0)) @ basis.T, full_matrices=False)[2] @ basis
        means = torch.stack([states[labels == label].mean(0) for label in (0, 1)])
        gap = basis @ (means[1] - means[0])
        basis = basis * torch.where(gap < 0, -1.0, 1.0)[:, None]
        beaten = ("control_labels", "control_weights", "random", "floor")
        floor = max(results[name]["high"] for name in beaten if name in results)
        fits_anything = "control_labels_train" in results and (
            results["train_accuracy"]["low"] <= results["control_labels_train"]["high"]
        )
        return Subspace(
            basis=basis.float(),
            scale=gap.abs().float(),
            origin=means.mean(0).float(),
            site=task.site,
            where=task.where,
            found=results["accuracy"]["low"] > floor and not fits_anything,
            notes={
                "finder": self.name,
                "settings": {**vars(self), "controls": list(self.controls)},
                "orientation": "towards label 1",
                "n": len(task.bases),
                "residual_norm": float(states.norm(dim=1).mean()),
                **results,
                **provenance,
            },
        )


def _divided(contrast: Contrast, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to judge by and rows to train on, sharing no group and no pair, both with both classes."""
    if len(contrast) < LEAST_ROWS:
        raise DataError(
            f"{contrast.name!r} has {len(contrast)} prompts; DAS needs at least {LEAST_ROWS}, to train on some and "
            "judge by others. Add prompts."
        )
    parts = contrast.split_rows(holdout, seed=seed)
    for rows in parts:
        contrast.take(rows).require_both_classes(2)
    shuffled = torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(seed)).tolist()
    return parts[0], [parts[1][i] for i in shuffled]


def _tasks(
    das: DAS, model: HookedModel, contrast: Contrast, site: Site, where: Where, parts: tuple[list[int], list[int]]
) -> tuple[Interchange, Interchange]:
    """What is trained on, and what is judged by."""
    test, rest = parts
    task = Interchange(model, contrast, site, where, rest, batch_size=das.batch_size)
    return task, Interchange(model, contrast, site, where, test, batch_size=das.batch_size, acts=task.acts)


def judged(task: Interchange, change: Change, labels: Int[Tensor, "arm n"], seed: int) -> dict[str, Any]:
    """Interchange accuracy of every arm, each base once with a source of the other label and once with one of its own.

    Returns:
        Per arm, with Wilson intervals: over "all" pairs, those that should be "changed" (the published accuracy; a
        subspace that turns every answer around has it too) and those to be "kept"; and the mean "loss".
    """
    hits: list[Tensor] = []
    should: list[Tensor] = []
    losses: list[Tensor] = []
    own = task.answers[task.bases, task.labels[task.bases]]
    for same in (0.0, 1.0):
        sources = task.sources(same=same, seed=seed)
        loss, hit = task.score(change, sources, labels)
        losses.append(loss)
        hits.append(hit)
        should.append(task.wanted(labels, sources) != own)
    hit, move = torch.cat(hits, dim=1), torch.cat(should, dim=1)
    kinds = {"all": torch.ones_like(move), "changed": move, "kept": ~move}
    units = task.units[task.bases].repeat(2)
    found: dict[str, Any] = {
        name: [_share(row[which], units[which]) for row, which in zip(hit, picked, strict=True)]
        for name, picked in kinds.items()
    }
    return found | {"loss": torch.cat(losses, dim=1).mean(1)}


def _share(hits: Tensor, units: Tensor) -> dict[str, float]:
    """Share of hits with its Wilson interval, as if each unit of joined prompts were one trial."""
    if not len(hits):
        return {"estimate": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    share, n = float(hits.double().mean()), len(units.unique())
    _, low, high = wilson_interval(round(share * n), n)
    return {"estimate": share, "low": low, "high": high, "n": len(hits)}


def _largest(shares: list[dict[str, float]]) -> dict[str, float]:
    return max(shares, key=lambda share: share["estimate"])


def _arbitrary(labels: Int[Tensor, "arm n"], seed: int) -> Int[Tensor, "arm n"]:
    """The labels handed out anew, in every row otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in labels])


def _agreement(trained: Trained, true: int) -> dict[str, Any]:
    """Largest principal angle between every two starts, in degrees; 90 where their ranks differ."""
    frames = [trained.frame(arm) for arm in range(true)]
    angles = [
        float(principal_angles(a, b)[-1].rad2deg()) if len(a) == len(b) else 90.0
        for i, a in enumerate(frames)
        for b in frames[i + 1 :]
    ]
    return {"angles_between_starts": angles, "ranks": [len(frame) for frame in frames]}
