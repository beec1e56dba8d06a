"""Passes continued from a token on equal full passes, in every family."""

import pytest
import torch

from tests.models.tiny import LAYERS, VARIANTS, batch, tiny

DECODERS = [variant for variant in VARIANTS if variant != "bert"]
CLOSE = 1e-5
LENGTHS = {"one": (9,), "ragged": (9, 6, 3), "square": (4, 4, 2, 4), "unpadded": (5, 5, 5)}


def _model(variant: str, **changed):
    from subspace_probe.models.native import NativeModel

    return NativeModel(tiny(variant, **changed), name=variant)


def _at_last(seed: int = 0):
    from subspace_probe.core.edits import At
    from subspace_probe.core.tokens import at

    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return At(at(-2), lambda x, rows: x + vector)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("variant", DECODERS)
def test_continuing_from_a_token_is_a_full_run(variant: str, lengths: tuple[int, ...]) -> None:
    from subspace_probe.core.edits import Stacked
    from subspace_probe.core.sites import Site

    model, shown = _model(variant), batch(*lengths)
    column = shown.ids.shape[1] - 2
    for layer in range(LAYERS):
        writes = {Site(layer, "attn_out"): _at_last(), Site(LAYERS - 1, "mlp_out"): _at_last(1)}
        whole = model.run(shown, writes=writes).logits
        clean = model.run(shown).logits
        prefix = model.prefix(shown, layer, column=column)
        found = model.run(shown, writes=writes, prefix=prefix).logits
        assert _distance(found[:, -2:], whole[:, -2:]) < CLOSE
        assert _distance(clean[:, -2:], whole[:, -2:]) > 1e-3  # control: the edit does something
        twice = prefix.repeat(2)
        stacked = {site: Stacked([edit, None], prefix.batch) for site, edit in writes.items()}
        edited, left = model.run(twice.batch, writes=stacked, prefix=twice).logits.chunk(2)
        assert _distance(edited[:, -2:], whole[:, -2:]) < CLOSE
        assert _distance(left[:, -2:], clean[:, -2:]) < CLOSE


@pytest.mark.parametrize("variant", DECODERS)
def test_earlier_columns_are_really_left_out(variant: str) -> None:
    """The saving is real where keys are kept, and given up where a sliding window has dropped some."""
    model, shown = _model(variant), batch(9, 6)
    prefix = model.prefix(shown, 1, column=6)
    slides = "sliding_window" in VARIANTS[variant][2]
    assert prefix.column == (0 if slides else 6)
    assert prefix.hidden.shape[1] == 9 - prefix.column
    short = model.prefix(batch(4, 3), 1, column=2)  # within the window nothing has been dropped
    assert short.column == 2


def test_the_eager_implementation_too() -> None:
    from subspace_probe.core.sites import Site

    for lengths in LENGTHS.values():
        model, shown = _model("llama", attn_implementation="eager"), batch(*lengths)
        writes = {Site(1): _at_last()}
        whole = model.run(shown, writes=writes).logits
        prefix = model.prefix(shown, 1, column=shown.ids.shape[1] - 2)
        assert _distance(model.run(shown, writes=writes, prefix=prefix).logits[:, -2:], whole[:, -2:]) < CLOSE


def test_a_square_mask_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: leaving the mask out, as Transformers does for unpadded prompts, aligns it with the wrong tokens."""
    from subspace_probe.core.sites import Site
    from subspace_probe.models import resume

    model, shown = _model("llama"), batch(5, 5)
    whole = model.run(shown, writes={Site(1): _at_last()}).logits
    monkeypatch.setattr(resume, "_placed", lambda call, hidden: {**call, "attention_mask": None})
    prefix = model.prefix(shown, 1, column=3)
    found = model.run(shown, writes={Site(1): _at_last()}, prefix=prefix).logits
    assert _distance(found[:, -2:], whole[:, -2:]) > 1e-2
