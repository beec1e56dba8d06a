"""Edits of rank one at run time, against the same edit made in the weights."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel


def test_it_is_the_edit_of_the_weight(chat: "HookedModel") -> None:
    """Each prompt beside a model whose down projection was changed for it, by Hugging Face alone."""
    import subspace_probe as sp
    from subspace_probe.interventions.conditions import condition_logits
    from subspace_probe.interventions.weight_edit import WeightEdit

    facts = sp.load_contrast("organism:chat/facts", n=4)
    generator = torch.Generator().manual_seed(0)
    hf = chat.backend.hf
    write, read = (torch.randn(4, d, generator=generator) / d**0.5 for d in (128, 384))
    edited, clean, elsewhere = condition_logits(
        chat, facts.prompts, [WeightEdit(1, write, read), None, WeightEdit(2, write, read)]
    )
    weight = hf.get_parameter("model.layers.1.mlp.down_proj.weight")
    for row, prompt in enumerate(facts.prompts):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight += torch.outer(write[row], read[row])
            try:
                by_hand = hf(chat.tokens([prompt]).ids).logits[0, -1]
            finally:
                weight.copy_(kept)
        assert torch.allclose(edited[row], by_hand, atol=2e-4)
        assert float((by_hand - clean[row]).abs().max()) > 1e-2
        assert float((by_hand - elsewhere[row]).abs().max()) > 1e-2  # control: another layer is another edit


def test_it_stands_for_a_patch(chat: "HookedModel") -> None:
    """What the MLP writes at the patched token; an edit made for another key writes something else."""
    import subspace_probe as sp
    from subspace_probe.interventions.weight_edit import WeightEdit
    from subspace_probe.linalg.rank_one_edits import edit_of_patch

    facts = sp.load_contrast("organism:chat/facts", n=2)
    site, out = sp.Site(1, "mlp_post"), sp.Site(1, "mlp_out")
    key = chat.capture(facts, sites=site, where=sp.LAST).at(site).double()
    direction = torch.nn.functional.normalize(torch.randn(384, dtype=torch.float64, generator=torch.Generator()), dim=0)
    weight = chat.backend.hf.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    edit = edit_of_patch(weight, key[0], torch.eye(384, dtype=torch.float64), direction, 3.0)
    made = WeightEdit(1, edit.write.repeat(2, 1), edit.read.repeat(2, 1))
    written = chat.capture(facts, sites=out, where=sp.LAST, interventions=[made]).at(out).double()
    wanted = (key + 3.0 * direction) @ weight.double().T
    away = (written - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(away[0]) < 1e-5
    assert float(away[1]) > 1e-3
