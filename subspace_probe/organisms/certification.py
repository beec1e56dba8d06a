"""Measuring what is true of an organism, on pairs it never saw.

Two kinds of numbers. *Certificates* make the ground truth: interchange of a planted coordinate, or of the whole state
at a position, against the causal model of ``grammar.answer_word``. *Behaviour* is what the published methods need to
hold on these weights: steering by class means, ablation of the direction one finds, reading at T_INST.

Everything is deterministic: fixed seeds, plain hooks (``probing``), no training code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypedDict, final

import torch
from torch import Tensor

from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import T_INST, T_POST_INST, Where
from subspace_probe.organisms.batches import Batch
from subspace_probe.organisms.grammar import COMPLY, REFUSE, VARIABLES, YES, Variable
from subspace_probe.organisms.probing import (
    GROUPS,
    Pass,
    Probe,
    add,
    at_positions,
    auroc,
    reject,
    sample,
    swap,
)
from subspace_probe.organisms.tokenizer import vocabulary
from subspace_probe.organisms.truth import Planted, ReadableNotUsed
from subspace_probe.organisms.words import Split

LAYER_OF: Final[Mapping[Variable, int]] = {"harmfulness": 1, "refusal": 2, "intent": 2}
WHERE_OF: Final[Mapping[Variable, Where]] = {"harmfulness": T_INST, "refusal": T_POST_INST, "intent": T_POST_INST}
_WORD: Final = {word: index for index, word in enumerate(vocabulary())}
_SOURCES: Final[Mapping[Variable, tuple[str, ...]]] = {
    "harmfulness": tuple(g for g in GROUPS if g.startswith(("request", "judgement"))),
    "refusal": tuple(g for g in GROUPS if g.startswith("request")),
    "intent": ("knob",),
}


class Measured(TypedDict):
    """The fields of a ``GroundTruth`` that are measured."""

    variables: tuple[Planted, ...]
    readable_not_used: ReadableNotUsed | None
    accuracy: dict[str, float]
    behaviour: dict[str, dict[str, float]]


@final
@dataclass(frozen=True, eq=False)
class Cells:
    """Every cell of the language, sampled from one split, with its clean pass."""

    batches: Mapping[str, Batch]
    passes: Mapping[str, Pass]

    @classmethod
    def run(cls, probe: Probe, split: Split, *, n: int, aligned: bool, seed: int = 0) -> "Cells":
        """Sample and run every cell."""
        batches = {g: sample(g, split, n, seed=seed, aligned=aligned) for g in GROUPS}
        return cls(batches, {g: probe.run(batch) for g, batch in batches.items()})

    def states(self, group: str, variable: Variable, layer: int | None = None) -> Tensor:
        """States where a variable lives (or at the same position of another layer)."""
        layer = LAYER_OF[variable] if layer is None else layer
        seen = self.passes[group].t_inst if variable == "harmfulness" else self.passes[group].t_post
        return seen[layer]

    def where(self, group: str, variable: Variable) -> Tensor:
        """Token positions where a variable lives."""
        return self.batches[group].t_inst if variable == "harmfulness" else self.batches[group].t_post


def share(hits: Tensor) -> float:
    """Mean of a boolean tensor as a float, rounded so that files compare."""
    return round(float(hits.double().mean()), 4)


def accuracy(cells: Cells) -> dict[str, float]:
    """First answered word right, per cell."""
    return {g: share(cells.passes[g].words == cells.batches[g].first) for g in GROUPS}


def interchange(probe: Probe, cells: Cells, variable: Variable, vector: Tensor) -> dict[str, float]:
    """Interchange accuracy per cell: the answer equals the causal model's, including where nothing may change.

    Sources alternate between values and come from every cell that defines the variable, another one for each base.
    """
    number = VARIABLES.index(variable)
    states = torch.cat([cells.states(g, variable) for g in _SOURCES[variable]])
    values = torch.cat([cells.batches[g].values[:, number] for g in _SOURCES[variable]])
    out = {}
    for k, group in enumerate(GROUPS):
        batch = cells.batches[group]
        n = len(batch)
        generator = torch.Generator().manual_seed(1000 + k)
        ones, zeros = (
            (values == x).nonzero().flatten()[torch.randint(int((values == x).sum()), (n,), generator=generator)]
            for x in (1, 0)
        )
        own = batch.values[:, number]
        wanted = torch.where(own >= 0, 1 - own, torch.arange(n) % 2)
        source = torch.where(wanted == 1, ones, zeros)
        edit = at_positions(cells.where(group, variable), swap(vector, states[source]))
        words = probe.run(batch, {LAYER_OF[variable]: edit}).words
        out[group] = share(words == batch.implied[torch.arange(n), number, wanted])
    return out


def whole_state(probe: Probe, cells: Cells, group: str) -> dict[str, float]:
    """Share of judgements that change when the whole state at T_INST comes from a prompt of the other label.

    Per layer, and for all layers at once. Below .05 everywhere means that the judgement does not come from there.
    """
    batch, clean = cells.batches[group], cells.passes[group]
    # Cells alternate harmful and harmless, so the next row but a few has the other label and other words.
    source = torch.arange(len(batch)).roll(7)
    edits = {
        layer: at_positions(batch.t_inst, lambda x, index, state=state: state[source[index]])
        for layer, state in enumerate(clean.t_inst)
    }
    out = {f"layer {layer}": share(probe.run(batch, {layer: edit}).words != clean.words)
           for layer, edit in edits.items()}  # fmt: skip
    out["all layers"] = share(probe.run(batch, edits).words != clean.words)
    return out


def difference_of_means(cells: Cells, variable: Variable, layer: int, *, balanced: bool) -> Tensor:
    """Class mean difference over requests: plain ones, or the 2 x 2 of harmful and refused."""

    def mean(framing: str, harmful: int) -> Tensor:
        group = f"request.{framing}"
        return cells.states(group, variable, layer)[cells.batches[group].values[:, 0] == harmful].mean(0)

    plain = mean("plain", 1) - mean("plain", 0)
    if not balanced:
        return plain
    jailbroken, strict = mean("jailbreak", 1), mean("strict", 0)
    sign = 1 if variable == "harmfulness" else -1
    return (mean("plain", 1) - mean("plain", 0) + sign * (jailbroken - strict)) / 2


def reading(train: Cells, test: Cells, layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """AUROC at T_INST of the plain difference of means (fitted on train pairs), per layer and framing."""
    out = {}
    for layer in layers:
        direction = difference_of_means(train, "harmfulness", layer, balanced=False)
        scores = {group: test.states(group, "harmfulness", layer) @ direction for group in _SOURCES["harmfulness"]}
        out[f"layer {layer}"] = {
            group: round(auroc(score, test.batches[group].values[:, 0]), 4) for group, score in scores.items()
        }
    return out


def steering(probe: Probe, cells: Cells, train: Cells, *, aligned: bool) -> dict[str, float]:
    """What adding class means does to requests and judgements, with random directions of equal length beside."""
    out: dict[str, float] = {}
    generator = torch.Generator().manual_seed(5)

    def rate(group: str, label: int, word: str, layer: int, where: str, vector: Tensor) -> float:
        batch = cells.batches[group].take((cells.batches[group].values[:, 0] == label).nonzero().flatten())
        if vector.ndim == 2:
            vector = vector[: len(batch)]
        if where == "all":
            edit = {layer: lambda x, index: x + vector}
        else:
            edit = {layer: at_positions(getattr(batch, where), add(vector))}
        return share(probe.run(batch, edit).words == _WORD[word])

    def noise(length: Tensor) -> Tensor:
        drawn = torch.randn(4096, len(vectors["plain"]), generator=generator)
        return drawn / drawn.norm(dim=-1, keepdim=True) * length

    for balanced in (False, True):
        name = "balanced" if balanced else "plain"
        vectors = {"plain": difference_of_means(train, "harmfulness", 1, balanced=balanced)}
        v = vectors["plain"]
        for framing in ("plain", "jailbreak", "strict"):
            out[f"H+{name} harmless judgement.{framing} -> yes"] = rate(f"judgement.{framing}", 0, YES, 1, "t_inst", v)
        out[f"H-{name} harmful judgement.plain -> yes"] = rate("judgement.plain", 1, YES, 1, "t_inst", -v)
        out[f"random {name} at t_inst judgement.plain -> yes"] = rate("judgement.plain", 0, YES, 1, "t_inst",
                                                                      noise(v.norm()))  # fmt: skip
        if not aligned:
            continue
        out[f"H+{name} harmless request.plain -> refused"] = rate("request.plain", 0, REFUSE, 1, "t_inst", v)
        r = difference_of_means(train, "refusal", 2, balanced=balanced)
        for where in ("t_post", "all"):
            out[f"R+{name} {where} harmless request.plain -> refused"] = rate("request.plain", 0, REFUSE, 2, where, r)
            out[f"R+{name} {where} harmless judgement.plain -> yes"] = rate("judgement.plain", 0, YES, 2, where, r)
            out[f"R+{name} {where} harmful judgement.plain -> yes"] = rate("judgement.plain", 1, YES, 2, where, r)
        out[f"R+{name} t_inst harmless judgement.plain -> yes"] = rate("judgement.plain", 0, YES, 2, "t_inst", r)
        out[f"R-{name} t_post harmful request.plain -> refused"] = rate("request.plain", 1, REFUSE, 2, "t_post", -r)
        out[f"random {name} at t_post request.plain -> refused"] = rate("request.plain", 0, REFUSE, 2, "t_post",
                                                                        noise(r.norm()))  # fmt: skip
    return out


def ablation(probe: Probe, cells: Cells, vector: Tensor) -> dict[str, float]:
    """Directional ablation everywhere: refusal rate of what was refused, and accuracy of everything else."""
    out = {}
    for group in GROUPS:
        batch = cells.batches[group]
        words = probe.run(batch, everywhere=reject(vector)).words
        if group in ("request.plain", "request.strict"):
            refused = batch.first == _WORD[REFUSE]
            out[f"{group} refused"] = share(words[refused] == _WORD[REFUSE])
            out[f"{group} complied"] = share(words[refused] == _WORD[COMPLY])
        else:
            out[group] = share(words == batch.first)
    return out


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two vectors."""
    return round(float(torch.nn.functional.cosine_similarity(left, right, dim=0)), 4)


def measure(
    probe: Probe, variables: Sequence[Variable], vectors: Mapping[Variable, Tensor], *, aligned: bool, n: int
) -> Measured:
    """Everything about one organism, as the fields of a ``GroundTruth``."""
    test = Cells.run(probe, "test", n=n, aligned=aligned)
    train = Cells.run(probe, "train", n=2 * n, aligned=aligned, seed=1)
    generator = torch.Generator().manual_seed(11)
    planted = []
    for variable in variables:
        noise = torch.randn(len(vectors[variable]), generator=generator)
        planted.append(
            Planted(
                variable, Site(LAYER_OF[variable]), WHERE_OF[variable], vectors[variable], n=n,
                interchange=interchange(probe, test, variable, vectors[variable]),
                control=interchange(probe, test, variable, noise / noise.norm()),
            )
        )  # fmt: skip
    layers = range(len(probe.layers))
    read = reading(train, test, layers)
    behaviour: dict[str, dict[str, float]] = {f"auroc at t_inst, {layer}": cells for layer, cells in read.items()}
    behaviour["cosine of found and planted"] = {
        f"{variable}, {'balanced' if balanced else 'plain'}": cosine(
            difference_of_means(train, variable, LAYER_OF[variable], balanced=balanced), vectors[variable]
        )
        for variable in variables
        if variable != "intent"
        for balanced in (False, True)
    }
    behaviour["steering"] = steering(probe, test, train, aligned=aligned)
    if aligned:
        for balanced in (False, True):
            found = difference_of_means(train, "refusal", LAYER_OF["refusal"], balanced=balanced)
            name = "balanced" if balanced else "plain"
            behaviour[f"ablation of refusal as found ({name})"] = ablation(probe, test, found)
        if "refusal" in variables:
            behaviour["ablation of refusal as planted"] = ablation(probe, test, vectors["refusal"])
    changed = whole_state(probe, test, "judgement.plain")
    behaviour["judgements changed by the whole state at t_inst"] = changed
    unused = None
    if not variables:
        validation = Cells.run(probe, "val", n=n, aligned=aligned, seed=2)
        scores = reading(train, validation, layers)
        # Nothing reads the last block's output at this token: "not used" would be true there of any model.
        best = max(layers[:-1], key=lambda layer: scores[f"layer {layer}"]["request.plain"])
        unused = ReadableNotUsed("harmfulness", Site(best), T_INST, read[f"layer {best}"], changed, n)
    return {
        "variables": tuple(planted),
        "readable_not_used": unused,
        "accuracy": accuracy(test),
        "behaviour": behaviour,
    }
