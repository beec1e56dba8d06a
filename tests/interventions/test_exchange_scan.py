"""Exchanges by layer and position against bare forward hooks on the Hugging Face module."""

import pytest
import torch


@pytest.fixture(scope="module")
def knob():
    import subspace_probe as sp

    return sp.load_model("organism:knob"), sp.load_contrast("organism:knob/instruction", n=40)


def _by_hand(model, contrast, sources, layer, position, basis=None):
    """Whether each prompt answers with its foil, the output of a block exchanged by a hook of our own."""
    hf, ids = model.backend.hf, model.tokens(contrast.prompts).ids
    kept: list[torch.Tensor] = []
    block = hf.model.layers[layer]

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def put(_module, _inputs, output):
        states = first(output).clone()
        change = kept[0][sources, position] - states[:, position]
        states[:, position] += change if basis is None else change @ basis.T @ basis
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with torch.no_grad():
        handle = block.register_forward_hook(lambda _m, _i, output: kept.append(first(output)))
        hf(ids)
        handle.remove()
        handle = block.register_forward_hook(put)
        logits = hf(ids).logits[:, -1]
        handle.remove()
    foils = torch.tensor(model.token_ids([prompt.foil or "" for prompt in contrast.prompts]))
    return (logits.argmax(-1) == foils).double()


@pytest.mark.parametrize("another", [False, True])
def test_scan_equals_hooks(knob, another: bool) -> None:
    from subspace_probe.core.tokens import LAST, at
    from subspace_probe.interventions.exchange_scan import exchange_scan, source_rows

    model, contrast = knob
    sources = source_rows(contrast, another=another, seed=5)
    found = exchange_scan(model, contrast, sources, [LAST, at(-2), at(2)])
    assert found.shape == (4, 3, 40)
    for layer in range(4):
        for column, position in enumerate((-1, -2, 2)):
            assert torch.equal(found[layer, column], _by_hand(model, contrast, sources, layer, position))
    assert 0 < float(found.mean()) < 1  # the control: not one constant


def test_within_a_direction_equals_hooks(knob) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.exchange_scan import exchange_within, source_rows

    model, contrast = knob
    sources = source_rows(contrast, another=True)
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    spaces = [sp.Subspace.span(vector, site=sp.Site(layer)) for vector, layer in zip(vectors, (0, 2, 0), strict=True)]
    wide = sp.Subspace.span(torch.eye(64), site=sp.Site(0))
    found = exchange_within(model, contrast, sources, [*spaces, wide])
    for row, space in enumerate([*spaces, wide]):
        layer = space.site.layer if space.site else -1
        assert torch.equal(found[row], _by_hand(model, contrast, sources, layer, -1, space.basis))


def test_sources_have_the_other_label_and_the_question_asked_for(knob) -> None:
    from subspace_probe.interventions.exchange_scan import source_rows

    _, contrast = knob
    labels, pairs, groups = (torch.tensor(getattr(contrast, name)) for name in ("labels", "pairs", "groups"))
    same, other = (source_rows(contrast, another=another, seed=1) for another in (False, True))
    for rows in (same, other):
        assert torch.equal(labels[rows], 1 - labels)
    assert torch.equal(pairs[same], pairs)
    assert bool((groups[other] != groups).all())
    assert not torch.equal(other, source_rows(contrast, another=True, seed=2))


def test_what_is_missing_is_said(knob) -> None:
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.core.errors import DataError, SiteError
    from subspace_probe.interventions.exchange_scan import exchange_within, source_rows, turned

    model, contrast = knob
    with pytest.raises(DataError, match="no partner of the other label"):
        source_rows(contrast.take([0, 2]), another=False)
    with pytest.raises(DataError, match="foil"):
        turned(contrast.map(lambda prompt: replace(prompt, foil=None)))
    nowhere, sources = sp.Subspace.span(torch.ones(64)), source_rows(contrast, another=False)
    with pytest.raises(SiteError, match="does not say where"):
        exchange_within(model, contrast, sources, [nowhere])
