"""Attributions against finite steps, exact where the metric is linear, complete when integrated."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.sites import Site
    from subspace_probe.models.hooked import HookedModel

TOKENS, STEP = 5, 1e-4
CLEAN = [text(TOKENS, seed) for seed in (0, 1)]
CORRUPT = [text(TOKENS, seed) for seed in (50, 51)]


def metric(logits: Tensor, prompts: Sequence[object]) -> Tensor:
    """Curved in the logits."""
    return torch.tanh(0.1 * logits[:, 5]) - logits[:, 9] + 0.05 * logits[:, 7].square()


def model_of(variant: str, *, double: bool = False, **changed: Any) -> "HookedModel":
    """In double precision finite steps may be small."""
    from subspace_probe.models import load_model

    hf = tiny(variant, **changed)
    return load_model(copy.deepcopy(hf).double() if double else hf, tokenizer=words())


def along(model: "HookedModel", site: "Site", column: slice | int, steps: Sequence[float]) -> Tensor:
    """The metric with a site's states moved part of the way from base to source, [step, n]; by `run(writes=...)`."""
    base, source = model.tokens(CORRUPT), model.tokens(CLEAN)
    states = model.run(source, reads=[site]).reads[site]
    found: list[Tensor] = []
    for step in steps:

        def move(x: Tensor, ctx: object, step: float = step) -> Tensor:
            edited = x.clone()
            edited[:, column] += step * (states - x)[:, column]
            return edited

        found.append(metric(model.run(base, writes={site: move}).logits[:, -1], CORRUPT))
    return torch.stack(found).double()


@pytest.mark.parametrize("variant", ["gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_equals_finite_steps(variant: str) -> None:
    """A small part of the way to either side."""
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.attribution import attribution

    model, streams = model_of(variant, double=True), ("resid_pre", "z", "mlp_out", "resid_post")
    found = attribution(model, CLEAN, CORRUPT, metric, streams=streams)
    assert found.values.shape == (len(streams), 3, TOKENS, 2)
    scale = float(found.values.abs().max())
    for s, name in enumerate(streams):
        for layer in (0, 2):
            for p in range(TOKENS):
                ahead, behind = along(model, Site(layer, name), p, (STEP, -STEP))
                assert torch.allclose(found.values[s, layer, p], (ahead - behind) / (2 * STEP), atol=1e-6 * scale)
    # control: another layer's gradient is another number
    assert float((found.values[0, 0] - found.values[0, 2]).abs().max()) > 0.1 * scale


def test_heads_add_up_to_their_stream_and_see_subspaces() -> None:
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.attribution import attribution

    model = model_of("llama")
    whole = attribution(model, CLEAN, CORRUPT, metric, streams=("z",))
    heads = attribution(model, CLEAN, CORRUPT, metric, streams=("z",), heads=True)
    assert heads.values.shape == (1, 3, TOKENS, 4, 2)
    assert torch.allclose(heads.values.sum(3), whole.values, atol=1e-5)
    axes = [Subspace.span(row) for row in torch.eye(8)]
    parts = [
        attribution(model, CLEAN, CORRUPT, metric, streams=("z",), heads=True, subspace=axis).values for axis in axes
    ]
    assert torch.allclose(torch.stack(parts).sum(0), heads.values, atol=1e-5)
    assert float((parts[0] - heads.values).abs().max()) > 1e-3  # control: one axis is not all


def test_integrated_adds_up_to_the_exchange_of_the_whole_layer() -> None:
    """Integrated gradients are complete; the gradient at the base is not."""
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.attribution import attribution

    model, streams = model_of("llama"), ("resid_pre", "attn_out")
    at_base = attribution(model, CLEAN, CORRUPT, metric, streams=streams)
    found = attribution(model, CLEAN, CORRUPT, metric, streams=streams, integrated=200)
    assert found.values.shape == at_base.values.shape
    for s, name in enumerate(streams):
        for layer in range(3):
            start, end = along(model, Site(layer, name), slice(None), (0.0, 1.0))
            assert torch.allclose(
                found.values[s, layer].sum(0), end - start, atol=0.02 * float((end - start).abs().max())
            )
            assert not torch.allclose(at_base.values[s, layer].sum(0), end - start, atol=0.1 * float(end.abs().max()))


def linear(model: "HookedModel") -> Any:
    """A metric that is linear in the logits."""
    direction = torch.randn(model.spec.d_vocab, generator=torch.Generator().manual_seed(0))
    return lambda logits, prompts: logits @ direction


def test_is_exact_where_everything_above_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the final norm the last block's output reaches such a metric linearly, and the estimate is the effect."""
    from subspace_probe.interventions.attribution import agreement, attribution
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("llama", initializer_range=0.2)
    monkeypatch.setattr(model.backend.base.norm, "forward", lambda x: x)
    settings: Any = {"streams": ("resid_post", "mlp_out"), "layers": [-1]}
    sweep = patch_sweep(model, CLEAN, CORRUPT, linear(model), **settings)
    for steps in (0, 2):
        found = attribution(model, CLEAN, CORRUPT, linear(model), integrated=steps, **settings)
        scale = float(found.values.abs().max())
        assert torch.allclose(found.values, sweep.values - sweep.base, atol=1e-4 * scale)
        close = agreement(sweep, found)
        assert close.pearson == pytest.approx(1, abs=1e-6)
        # control: from lower down the way to the metric is curved
        lower = dict(settings, layers=[0])
        other = attribution(model, CLEAN, CORRUPT, linear(model), integrated=steps, **lower)
        exact = patch_sweep(model, CLEAN, CORRUPT, linear(model), **lower)
        assert agreement(exact, other).pearson < 0.999


def test_agreement_is_of_the_same_cells() -> None:
    import numpy as np
    from scipy.stats import spearmanr

    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.attribution import agreement, attribution
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model = model_of("gpt2")
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric)
    found = attribution(model, CLEAN, CORRUPT, metric)
    both = [(sweep.values - sweep.base).mean(-1).flatten().numpy(), found.values.mean(-1).flatten().numpy()]
    close = agreement(sweep, found)
    assert close.pearson == pytest.approx(float(np.corrcoef(both)[0, 1]))
    assert close.spearman == pytest.approx(float(spearmanr(*both)[0]))
    assert [finding.estimate for finding in close.findings()] == [close.pearson, close.spearman]
    with pytest.raises(ConfigError, match="layers are"):
        agreement(sweep, attribution(model, CLEAN, CORRUPT, metric, layers=[0, 1]))
    with pytest.raises(ConfigError, match="no gradient"):
        attribution(model, CLEAN, CORRUPT, lambda logits, prompts: (logits[:, 5] > 0).double())


def test_agreement_is_of_the_same_prompts_model_and_subspace() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.interventions.attribution import agreement, attribution
    from subspace_probe.interventions.patch_sweep import patch_sweep

    model, cells = model_of("gpt2"), {"layers": [1]}
    lines = [Subspace.span(row) for row in torch.eye(32)[:2]]
    sweep = patch_sweep(model, CLEAN, CORRUPT, metric, subspace=lines[0], **cells)
    same = attribution(model, CLEAN, CORRUPT, metric, subspace=lines[0], **cells)
    assert -1 <= agreement(sweep, same).pearson <= 1  # control
    for subspace in (None, lines[1]):
        with pytest.raises(ConfigError, match="of different things: subspace"):
            agreement(sweep, attribution(model, CLEAN, CORRUPT, metric, subspace=subspace, **cells))
    for prompts in ((CLEAN[::-1], CORRUPT[::-1]), (CLEAN, CORRUPT[::-1]), (CORRUPT, CLEAN)):
        with pytest.raises(ConfigError, match="of different things: prompts"):
            agreement(sweep, attribution(model, *prompts, metric, subspace=lines[0], **cells))
    other = model_of("gpt2", initializer_range=0.2)
    with pytest.raises(ConfigError, match="of different things: fingerprint"):
        agreement(sweep, attribution(other, CLEAN, CORRUPT, metric, subspace=lines[0], **cells))


def test_ragged_pairs_and_standing_edits() -> None:
    """Stated positions of prompts of different lengths; an edited model is differentiated as it is edited."""
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import LAST, at
    from subspace_probe.interventions.attribution import attribution
    from subspace_probe.interventions.steer import Steer

    model = model_of("llama")
    clean, corrupt = [text(4, 7), text(6, 8)], [text(6, 9), text(3, 10)]
    found = attribution(model, clean, corrupt, metric, positions=[at(1), LAST])
    for row in range(2):
        alone = attribution(model, clean[row : row + 1], corrupt[row : row + 1], metric, positions=[at(1), LAST])
        assert torch.allclose(found.values[..., row], alone.values[..., 0], atol=1e-5)
    with pytest.raises(PositionError, match="cannot move together"):
        attribution(model, clean, corrupt, metric, positions=[at(2), LAST], integrated=2)
    model = model_of("gpt2", double=True)  # its norms compute in double precision, Llama's in single
    vector, site = Subspace.span(torch.randn(32, generator=torch.Generator().manual_seed(3))), Site(2, "mlp_out")
    with model.intervened(Steer(vector, site=Site(1), strength=2.0)) as steered:
        found = attribution(steered, CLEAN, CORRUPT, metric, streams=("mlp_out",)).values[0, 2, 4]
        ahead, behind = along(steered, site, 4, (STEP, -STEP))
    plain = along(model, site, 4, (STEP, -STEP))
    assert torch.allclose(found, (ahead - behind) / (2 * STEP), rtol=1e-4)
    assert not torch.allclose(found, (plain[0] - plain[1]) / (2 * STEP), rtol=1e-2)  # control
