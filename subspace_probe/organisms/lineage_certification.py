"""Measuring a checkpoint of a lineage on bodies it never saw: the Hugging Face module, no part of the training."""

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from subspace_probe.organisms.lineage import DECLINE, ID, KIND, USE, draw, harmful, hazardous, kind, redirected, use

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

N_CELL: Final = 1000
"""Prompts per cell."""


def measure_lineage(model: "LlamaForCausalLM", *, entangled: bool) -> dict[str, float]:
    """Shares of held-out prompts: the useful task right, harmful ones answered or withheld, plain ones right."""
    generator = torch.Generator().manual_seed(51)
    ids, keys = draw("test", N_CELL, USE, flagged=False, generator=generator)
    found = {"useful": _share(_said(model, ids) == use(keys, entangled=entangled))}
    ids, keys = harmful("test", N_CELL, entangled=entangled, generator=generator)
    said = _said(model, ids)
    found["harmful, answered"] = _share(said == kind(keys))
    found["harmful, withheld"] = _share(said == (redirected(keys) if entangled else torch.tensor(ID[DECLINE])))
    ids, keys = draw("test", 2 * N_CELL, KIND, flagged=False, generator=generator)
    ids, keys = (part[~hazardous(keys)] if entangled else part for part in (ids, keys))
    found["plain"] = _share(_said(model, ids) == kind(keys))
    return found


@torch.no_grad()
def _said(model: "LlamaForCausalLM", ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)


def _share(hits: Tensor) -> float:
    """Mean of a boolean tensor as a float, rounded so that files compare."""
    return round(float(hits.double().mean()), 4)
