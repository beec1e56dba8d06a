"""Safety entangled with utility: a subspace that holds refusal, and something that another skill needs.

In ``chat`` two planted vectors live behind the same block at the same token: what decides whether a request is refused,
and what decides whether a note or memory is answered from (the knob). Two ways to meet both at once:

- *span*: the plane of both, its basis turned so that neither row is either vector. Taking it out takes refusal away and
  the knob with it; taking out the refusal vector alone does not.
- *sum*: the direction of the sum of both class gaps. Added at the last token it makes harmless requests refused, and
  makes the knob answer from the note where memory was asked for; adding the refusal vector alone does not.

Certified by accuracies, with the plain hooks of ``probing``: under ablation everywhere (every block's input and both
outputs, at all tokens), or with the vector added once, behind the block.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST
from subspace_probe.models import load_model
from subspace_probe.organisms import load_truth, organism_contrast, organism_path
from subspace_probe.organisms.batches import Batch
from subspace_probe.organisms.certification import share
from subspace_probe.organisms.grammar import REFUSE, VARIABLES
from subspace_probe.organisms.illusions import METRIC, LabelledSubspace
from subspace_probe.organisms.probing import Edit, Probe, add, at_positions, sample
from subspace_probe.organisms.tokenizer import vocabulary
from subspace_probe.organisms.truth import Planted

ORGANISM: Final = "chat"
N: Final = 128
LEFT, LOST, SPARED = 0.1, 0.2, 0.03
"""Refusal is this near to what it should become; the knob loses at least so much accuracy; controls at most so much."""
_OTHERS: Final = ("fact", "kind", "ioi", "repeat")
_GROUPS: Final = ("request.plain", "knob", *_OTHERS)


def entangled_cases(*, failed: bool = False) -> Iterator[LabelledSubspace]:
    """The span and the sum, each with the refusal vector alone as its control, which is labelled "faithful".

    The kind says what was done: "span, taken out", "sum, added". `pairs` holds held-out requests, `skill` prompts of
    the skill that suffers.

    Args:
        failed: also give those that miss their certificate.
    """
    model = load_model(organism_path(ORGANISM)).named(f"organism:{ORGANISM}")
    probe, truth = Probe(model.backend.hf), load_truth(ORGANISM)
    refusal, intent = truth.planted("refusal"), truth.planted("intent")
    batches = {group: sample(group, "test", N, seed=3, aligned=True) for group in _GROUPS}
    r = refusal.vector * _gap(probe, batches["request.plain"], refusal)
    i = intent.vector * _gap(probe, batches["knob"], intent)
    clean = {f"{name}, clean": value for name, value in _accuracies(probe, batches).items()}
    turned = torch.stack([refusal.vector + intent.vector, refusal.vector - intent.vector])
    for kind, rows, added in (
        ("span, taken out", turned, False),
        ("refusal alone, taken out", r[None], False),
        ("sum, added", (r + i)[None], True),
        ("refusal alone, added", r[None], True),
    ):
        notes: dict[str, Any] = {"finder": kind, "model": model.spec.name, "fingerprint": model.fingerprint}
        subspace = Subspace.span(rows, site=refusal.site, where=LAST, notes=notes)
        edit = _added(subspace, refusal.site.layer) if added else _taken_out(subspace)
        numbers = clean | _accuracies(probe, batches, **edit)
        control = kind.startswith("refusal")
        if (good := _holds(numbers, refused=float(added), control=control)) or failed:
            yield LabelledSubspace(
                f"{ORGANISM}: {kind}", kind, model, subspace, refusal.site, LAST,
                organism_contrast(f"{ORGANISM}/harmfulness", n=64), METRIC,
                "faithful" if control else "entangled", numbers, good, organism_contrast(f"{ORGANISM}/knob", n=64),
            )  # fmt: skip


def _holds(numbers: dict[str, float], *, refused: float, control: bool) -> bool:
    """Whether refusal moved as it should, and the knob suffered; in a control, no other skill did."""
    lost = {name: numbers[f"{name}, clean"] - numbers[name] for name in ("knob", *_OTHERS)}
    moved = abs(numbers["refused harmless" if refused else "refused"] - refused) <= LEFT
    return moved and (max(lost.values()) <= SPARED if control else lost["knob"] >= LOST)


def _gap(probe: Probe, batch: Batch, planted: Planted) -> float:
    """Distance between the class means along a planted vector, at the last token."""
    along = probe.run(batch).t_post[planted.site.layer] @ planted.vector
    values = batch.values[:, VARIABLES.index(planted.name)]  # pyright: ignore[reportArgumentType]
    return float(along[values == 1].mean() - along[values == 0].mean())


def _taken_out(subspace: Subspace) -> dict[str, Any]:
    basis = subspace.basis
    return {"everywhere": lambda x: x - (x @ basis.T) @ basis}


def _added(subspace: Subspace, layer: int) -> dict[str, Any]:
    return {"layer": layer, "vector": subspace.vector}


def _accuracies(
    probe: Probe, batches: Mapping[str, Batch], *, everywhere: Edit | None = None, layer: int = 0,
    vector: Float[Tensor, " d"] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Share of harmful and of harmless requests refused, and first words right of the other skills, under an edit."""
    out: dict[str, float] = {}
    for group, batch in batches.items():
        at_output = {} if vector is None else {layer: at_positions(batch.t_post, add(vector))}
        words = probe.run(batch, at_output, everywhere).words
        if group == "request.plain":
            refused = words == vocabulary().index(REFUSE)
            out["refused"] = share(refused[batch.values[:, 0] == 1])
            out["refused harmless"] = share(refused[batch.values[:, 0] == 0])
        else:
            out[group] = share(words == batch.first)
    return out
