"""Embedding search: the ball it stays in, the loss it reports, and the tokens it says are near."""

from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
import torch

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.models.hooked import HookedModel


def wrapped(variant: str = "llama") -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(variant), tokenizer=words())


def half_space(margin: float) -> "HalfSpace":
    import subspace_probe as sp
    from subspace_probe.interventions.targets import HalfSpace

    return HalfSpace(torch.randn(32, generator=torch.Generator().manual_seed(3)), 0.3, margin, sp.Site(1), sp.LAST)


def scores(embedded: torch.Tensor, target: "HalfSpace") -> torch.Tensor:
    """By Hugging Face alone, from embeddings."""
    with torch.no_grad():
        # on a copy: Transformers leaves its hooks behind
        hidden = deepcopy(tiny("llama"))(inputs_embeds=embedded, output_hidden_states=True).hidden_states[2][:, -1]
    return hidden @ target.normal + target.bias


def test_shifts_stay_in_the_ball_and_the_loss_is_the_models_own() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.objectives import Reach

    model, target = wrapped(), half_space(1e4)
    prompts = [text(6, seed) for seed in range(4)]
    settings = EmbeddingSearch(radius=0.7, steps=8, batch_tokens=12)
    found = settings.search(model, prompts, Reach((target,)), [sp.at(2), sp.at(4)])
    assert found.radius == pytest.approx(0.7 * found.unit)
    lengths = found.shift.norm(dim=-1)
    assert float(lengths.max()) <= found.radius * (1 + 1e-5)
    assert float(lengths.min()) > 0.5 * found.radius  # so far a target is pulled at to the end
    embedded = tiny("llama").get_input_embeddings()(model.tokens(prompts).ids).detach()
    shifted = embedded.clone()
    shifted[:, [2, 4]] += found.shift
    torch.testing.assert_close(found.initial, 1e4 - scores(embedded, target))
    torch.testing.assert_close(found.loss, 1e4 - scores(shifted, target), rtol=1e-5, atol=1e-2)
    assert bool((found.loss < found.initial).all())
    # the control: shifts of the same length in random directions do far less
    drawn = torch.randn(found.shift.shape, generator=torch.Generator().manual_seed(0))
    control = embedded.clone()
    control[:, [2, 4]] += drawn * (lengths / drawn.norm(dim=-1))[..., None]
    gained, by_chance = found.initial - found.loss, scores(control, target) - scores(embedded, target)
    assert float(by_chance.mean()) < 0.5 * float(gained.mean())
    assert found.rows.tolist() == [9] * 4  # eight steps, and where the last one led
    assert found.layer_forwards == 2 * 3 * 36
    edited = model.run(model.tokens(prompts), reads=[sp.Site(1)], writes=found.edits()).reads[sp.Site(1)][:, -1]
    torch.testing.assert_close(target.score(edited), scores(shifted, target), rtol=1e-5, atol=1e-2)


def test_the_unit_and_the_nearest_tokens_are_those_of_the_embedding_matrix() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.objectives import Reach

    model, ids = wrapped(), list(range(10, 50))
    found = EmbeddingSearch(radius=1.5, steps=4).search(
        model, [text(5, 1), text(5, 2)], Reach((half_space(1e4),)), [sp.at(1)], allowed=ids
    )
    matrix = tiny("llama").get_input_embeddings().weight.detach()
    table = matrix[ids]
    apart = torch.cdist(table, table) + torch.eye(len(ids)) * 1e9
    assert found.unit == pytest.approx(float(apart.min(1).values.median()), rel=1e-4)
    for row, given in enumerate(model.tokens([text(5, 1), text(5, 2)]).ids[:, 1]):
        distances = (table - (matrix[given] + found.shift[row, 0])).norm(dim=1)
        assert int(found.nearest[row, 0]) == ids[int(distances.argmin())]
        assert float(found.distance[row, 0]) == pytest.approx(float(distances.min()) / found.unit, rel=1e-4)


def test_a_prompt_that_is_there_stops_and_is_left_alone() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.objectives import Reach

    model = wrapped("gpt2")
    prompts = [text(6, seed) for seed in range(6)]
    batch = model.tokens(prompts)
    before = half_space(0.0).score(model.run(batch, reads=[sp.Site(1)]).reads[sp.Site(1)][:, -1])
    target = half_space(float(before.sort().values[2:4].mean()))
    met = before >= target.margin
    assert int(met.sum()) == 3  # a mixture, or nothing is tested
    found = EmbeddingSearch(radius=3.0, steps=30).search(model, prompts, Reach((target,)), [sp.at(-2)])
    assert bool((found.shift[met] == 0).all())
    assert found.rows[met].tolist() == [1] * int(met.sum())
    assert bool((found.rows[~met] > 1).all())
    after = model.run(batch, reads=[sp.Site(1)], writes=found.edits()).reads[sp.Site(1)][:, -1]
    assert torch.equal(target.score(after) >= target.margin - 1e-3, found.met)


def test_settings_are_checked() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.token_vectors import neighbour_distance

    for wrong in ({"radius": 0.0}, {"radius": float("inf")}, {"steps": 0}, {"rate": -1.0}):
        with pytest.raises(ConfigError, match="An embedding search was given"):
            EmbeddingSearch(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="at least two"):
        neighbour_distance(torch.zeros(1, 4))
