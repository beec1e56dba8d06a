"""Active subspaces against closed forms, plain autograd and the planted directions of an organism."""

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models.hooked import HookedModel


def metric(logits: Tensor, prompts: object) -> Tensor:
    return torch.tanh(0.1 * logits[:, 5]) - logits[:, 9]


def llama() -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("llama"), tokenizer=words())


def contrast(order: tuple[int, ...] = tuple(range(12))) -> "Contrast":
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    prompts = tuple(Prompt(text=text(3 + i % 5, i)) for i in order)
    return Contrast("words", prompts, tuple(i % 2 for i in order), pairs=tuple(i // 2 for i in order))


def fit(site: str = "L1.resid_post", data: "Contrast | None" = None, **settings: Any) -> "Subspace":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.active_subspace import ActiveSubspace

    where = settings.pop("where", LAST)
    finder = ActiveSubspace(**{"objective": metric, **settings})
    return finder.fit(llama(), data or contrast(), Site.parse(site), where)


def test_three_directions_of_a_function_are_recovered_and_principal_components_are_not_them() -> None:
    """f(x) = sin(a.x) + (b.x)^2 + (c.x)^3 / 3 in 64 dimensions: its gradients lie in span(a, b, c), exactly.

    The data vary elsewhere, so their leading principal components are nearly orthogonal to it.
    """
    from subspace_probe.finders.active_subspace import active_directions
    from subspace_probe.linalg.angles import overlap

    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0].T
    a, b, c = frame[:3]
    sizes = torch.cat([torch.ones(3), torch.full((3,), 10.0), torch.ones(58)]).double()
    x = torch.randn(500, 64, generator=generator, dtype=torch.float64) * sizes @ frame
    gradients = (x @ a).cos()[:, None] * a + 2 * (x @ b)[:, None] * b + (x @ c).square()[:, None] * c
    values, basis = active_directions(gradients)
    assert overlap(basis[:3], frame[:3]) == pytest.approx(1.0, abs=1e-12)
    assert float(values[3]) < 1e-20 * float(values[0])
    moment = gradients.T @ gradients / 500
    assert torch.allclose(moment, (basis * values[:, None]).T @ basis, atol=1e-10)
    assert bool((basis[:3] @ gradients.mean(0) >= 0).all())
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    assert overlap(components, frame[:3]) < 0.01  # control


def test_the_last_state_under_the_final_norm_has_the_gradient_worked_out_by_hand() -> None:
    """For y = g * x / r, r = sqrt(mean x^2 + e), and w the difference of unembedding rows of the logits 3 and 8,

    grad = (g w) / r - x (x . g w) / (d r^3).
    """

    def difference(logits: Tensor, prompts: object) -> Tensor:
        return logits[:, 3] - logits[:, 8]

    found = fit("L2.resid_post", objective=difference, rank=3, null_draws=0)
    hf, acts = tiny("llama"), llama().capture(contrast(), sites="L2.resid_post")
    x = next(acts.at(site) for site in acts.rows.sites).double()
    read = (hf.lm_head.weight[3] - hf.lm_head.weight[8]).detach().double() * hf.model.norm.weight.detach().double()
    r = (x.square().mean(1, keepdim=True) + hf.config.rms_norm_eps).sqrt()
    g = read / r - x * (x @ read)[:, None] / (x.shape[1] * r**3)
    values, vectors = torch.linalg.eigh(g.T @ g / len(g))
    assert torch.allclose(found.scale.double().square(), values.flip(0)[:3], rtol=1e-4)
    assert torch.allclose((found.basis.double() @ vectors.flip(1)[:, :3]).abs(), torch.eye(3).double(), atol=1e-3)
    assert found.notes["mean_gradient_norm"] == pytest.approx(float(g.norm(dim=1).mean()), rel=1e-5)
    assert found.notes["energy"] == pytest.approx(float(values.flip(0)[:3].sum() / values.sum()), rel=1e-4)
    assert torch.allclose(found.origin.double(), x.mean(0), atol=1e-5)
    assert json.loads(json.dumps(found.notes)) == found.notes


def test_equals_plain_autograd_prompt_by_prompt() -> None:
    hf, rows = tiny("llama"), []
    for prompt in contrast().prompts:
        kept: list[Tensor] = []

        def keep(module: object, args: object, output: Tensor) -> None:
            kept.append(output)  # noqa: B023  (used in this turn only)

        handle = hf.model.layers[1].register_forward_hook(keep)
        ids = words()(prompt.text, return_tensors="pt")["input_ids"]
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        handle.remove()
        rows.append(torch.autograd.grad(metric(logits, None).sum(), kept)[0][0, -1])
    g = torch.stack(rows).double()
    found = fit(rank=2)
    values, vectors = torch.linalg.eigh(g.T @ g / len(g))
    assert torch.allclose(found.scale.double().square(), values.flip(0)[:2], rtol=1e-4)
    assert torch.allclose((found.basis.double() @ vectors.flip(1)[:, :2]).abs(), torch.eye(2).double(), atol=1e-3)
    assert bool((found.basis.double() @ g.mean(0) > 0).all())
    other = fit("L0.resid_post", rank=2)
    assert not torch.allclose(other.scale, found.scale, rtol=0.05)  # control: another block's


def test_a_step_along_it_raises_the_objective() -> None:
    from subspace_probe.core.edits import At
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST

    found, model, data = fit(), llama(), contrast()
    batch = model.tokens(data)

    def mean(step: float) -> float:
        edit = {Site(1): At(LAST, lambda x, rows: x + step * found.unit)}
        logits = model.run(batch, writes=edit, logits_to_keep=1).logits
        return float(metric(logits[:, -1], None).mean())

    slope = (mean(1e-2) - mean(-1e-2)) / 2e-2
    assert slope > 0
    # the mean slope is at most the root mean square slope, which the scale is
    assert slope <= float(found.scale[0]) * 1.001
    assert slope > 0.2 * float(found.scale[0])


def test_the_order_of_prompts_and_the_size_of_batches_change_nothing() -> None:
    order = (7, 2, 11, 0, 5, 9, 1, 3, 10, 4, 6, 8)
    for along in (0, 3):
        one, two = fit(rank=None, along=along), fit(data=contrast(order), rank=None, along=along, batch_tokens=8)
        assert one.rank == two.rank
        assert torch.allclose(one.basis, two.basis, atol=1e-4)
        assert one.notes["p"] == two.notes["p"]
        assert one.notes["null_eigenvalue_95"] == pytest.approx(two.notes["null_eigenvalue_95"], rel=1e-5)


def test_gradients_along_the_way_are_those_of_partial_patches() -> None:
    """Their product with the step is the effect of the whole patch, on average over prompts too."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.active_subspace import ActiveSubspace

    model, data, site = llama(), contrast(), Site(1)
    acts = model.capture(data, sites=site, where=LAST)
    states = acts.at(site)
    source = states.view(6, 2, -1).flip(1).reshape(12, -1)  # pairs are (0, 1), (2, 3), ...
    gradients = ActiveSubspace(metric, along=30)._gradients(model, acts, states, site, metric, False)
    clean = model.logits(data)
    from subspace_probe.core.edits import At

    logits = model.run(model.tokens(data), writes={site: At(LAST, lambda x, rows: source[rows])}, logits_to_keep=1)
    effect = metric(logits.logits[:, -1], None) - metric(clean, None)
    assert torch.allclose((gradients * (source - states)).sum(1), effect, atol=0.01 * float(effect.abs().max()))
    local = ActiveSubspace(metric)._gradients(model, acts, states, site, metric, False)
    off = ((local * (source - states)).sum(1) - effect).abs().max()
    assert float(off) > 0.05 * float(effect.abs().max())  # control


def test_isotropic_gradients_are_not_found_and_shared_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of uneven lengths in random directions, put in the place of the model's."""
    import subspace_probe.finders.active_subspace as module

    hits = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(12, 32, generator=generator) * torch.linspace(0.2, 3.0, 12)[:, None]
        monkeypatch.setattr(module, "metric_gradients", lambda *a, g=drawn, **k: g)
        hits += fit().found
    assert hits <= 4  # 5 % of 20 is 1; more than 4 has probability .003
    shared = drawn + 3.0 * torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0) * 2
    monkeypatch.setattr(module, "metric_gradients", lambda *a, **k: shared)
    assert fit().found


def test_where_nothing_reaches_the_objective_it_says_so() -> None:
    from subspace_probe.core.tokens import at

    found = fit("L2.resid_post", where=at(0))
    assert not found.found
    assert float(found.scale[0]) == 0.0
    assert found.notes["reason"].startswith("Nothing downstream of L2.resid_post at at+0 reaches the objective")
    below = fit("L1.resid_post", where=at(0))
    assert "reason" not in below.notes  # control: one block below, later tokens attend to it


def test_what_cannot_be_asked_says_so() -> None:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.errors import ConfigError, DataError, RankError
    from subspace_probe.core.tokens import ALL
    from subspace_probe.finders.active_subspace import ActiveSubspace
    from subspace_probe.finders.protocols import ModelFinder

    unpaired = Contrast("words", contrast().prompts, contrast().labels)
    with pytest.raises(DataError, match="12 of 12 prompts"):
        fit(data=unpaired, along=2)
    with pytest.raises(ConfigError, match="many"):
        fit(where=ALL, along=2)
    with pytest.raises(RankError, match="span 12 directions"):
        fit(rank=13)
    with pytest.raises(ConfigError, match="no gradient"):
        fit(objective=lambda logits, prompts: (logits.argmax(-1) == 3).double())
    with pytest.raises(DataError, match="'answer'"):
        fit(objective="logit_difference")
    for settings in ({"rank": 0}, {"along": -1}, {"null_draws": -1}, {"rank": None, "null_draws": 0}):
        with pytest.raises(ConfigError):
            ActiveSubspace(**settings)
    assert isinstance(ActiveSubspace(), ModelFinder)
    assert fit(where=ALL, rank=20).notes["n"] == sum(3 + i % 5 for i in range(12))  # every token a row


@pytest.mark.slow
def test_the_organism_uses_its_planted_directions(chat: "HookedModel") -> None:
    """Cosines with the planted unit vectors, measured on 128 training requests: refusal .920 (along=4: .932).

    Harmfulness acts two blocks below, through a saturating computation: .541 from local gradients, .898 along the way.
    """
    from subspace_probe.finders.active_subspace import ActiveSubspace
    from subspace_probe.organisms import load_truth, organism_contrast

    data = organism_contrast("chat/requests", split="train", n=64)
    truth = load_truth("chat")

    def direction(at: str, along: int) -> Tensor:
        place = truth.planted(at)
        found = ActiveSubspace("refusal_score", along=along).fit(chat, data, place.site, place.where)
        assert found.found
        return found.unit

    refusal, harmfulness, intent = (truth.planted(name).vector for name in ("refusal", "harmfulness", "intent"))
    local = direction("refusal", 0)
    assert float(local @ refusal) > 0.85
    assert abs(float(local @ intent)) < 0.2  # control: readable there, and not what refusal is decided by
    assert float(direction("refusal", 3) @ refusal) > 0.85
    along, near = direction("harmfulness", 3), direction("harmfulness", 0)
    assert float(along @ harmfulness) > 0.8
    assert float(along @ harmfulness) > float(near @ harmfulness) + 0.1
