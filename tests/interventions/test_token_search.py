"""Token search: exact accounting, the exhaustive optimum of small spaces, and what planted suffixes it finds."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import CONTEXT, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.interventions.objectives import Evaluation, Reach
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.models.hooked import HookedModel

FREE_IDS = tuple(range(10, 22))
FAMILIES = ("llama", "gpt2", "gemma2", "bloom")


def wrapped(variant: str, backend: str = "native") -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny(variant), backend=backend, tokenizer=words())


def half_space(layer: int = 1, seed: int = 0, margin: float = 1e4, width: int = 32) -> "HalfSpace":
    """A random one, out of reach unless told otherwise."""
    import subspace_probe as sp
    from subspace_probe.interventions.targets import HalfSpace

    normal = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return HalfSpace(normal, 0.3, margin, sp.Site(layer), sp.LAST)


def reach(*targets: "HalfSpace", weights: tuple[float, ...] = ()) -> "Reach":
    from subspace_probe.interventions.objectives import Reach

    return Reach(targets, weights)


def by_hand(hf: Any, ids: torch.Tensor, target: "HalfSpace") -> torch.Tensor:
    """The hinge at the last token, by Hugging Face alone; ids without padding."""
    assert target.site is not None
    with torch.no_grad():
        # on a copy: Transformers leaves its hooks behind
        hidden = deepcopy(hf)(ids, output_hidden_states=True).hidden_states[target.site.layer + 1][:, -1]
    return (target.margin - (hidden @ target.normal.to(hidden) + target.bias)).clamp(min=0)


class Spy:
    """Counts the rows of every pass that goes into a block, and keeps the tokens."""

    def __init__(self, model: "HookedModel", monkeypatch: pytest.MonkeyPatch) -> None:
        from subspace_probe.interventions.objectives import EMBEDDED

        self.rows, self.gradients, self.ids = 0, 0, list[torch.Tensor]()
        run = model.backend.run

        def counted(batch: Any, **kwargs: Any) -> Any:
            if kwargs.get("stop_after") != EMBEDDED:  # looking up embeddings passes no block
                self.rows += batch.size
                self.gradients += batch.size * bool(kwargs.get("grad"))
                self.ids.append(batch.ids)
            return run(batch, **kwargs)

        monkeypatch.setattr(model.backend, "run", counted)


def test_n_replaced_falls_with_the_loss_and_is_at_least_one() -> None:
    from subspace_probe.interventions.token_search import n_replaced

    losses = [i / 20 for i in range(25)]
    for slots, rho in itertools.product((1, 2, 7, 30), (0.7, 1.3, 1.8)):
        counts = [n_replaced(slots, loss, 1.0, rho) for loss in losses]
        assert counts == sorted(counts)
        assert counts[0] == 1
        assert counts[20] == counts[-1] == slots
    assert n_replaced(30, 0.5, 1.0, 1.0) == 15  # floor(30 / 2)
    assert n_replaced(5, 1.0, 0.0, 1.8) == 5


@pytest.mark.parametrize("variant", FAMILIES)
def test_token_vectors_are_the_states_in_a_prompt(variant: str) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_vectors import token_vectors

    model = wrapped(variant)
    batch = model.tokens([text(6, 1)])
    states = model.run(batch, reads=[sp.Site(0, "resid_pre")]).reads[sp.Site(0, "resid_pre")][0]
    for position in (0, 3, 5):
        found = token_vectors(model, batch.ids[0], position=position)
        torch.testing.assert_close(found[position], states[position])
    elsewhere = token_vectors(model, batch.ids[0], position=1)[3]
    assert torch.allclose(elsewhere, states[3], atol=1e-4) != model.spec.learned_positions


@pytest.mark.parametrize(
    ("variant", "backend"),
    [*((variant, "native") for variant in FAMILIES), ("llama", "transformer_lens"), ("llama", "nnsight")],
)
def test_gradients_are_those_of_finite_differences(variant: str, backend: str) -> None:
    import subspace_probe as sp

    model = wrapped(variant, backend)
    evaluation = evaluated(model, [text(7, 3), text(4, 4)], half_space(1, margin=80.0), [sp.at(-3), sp.at(-2)])
    given = evaluation.given()
    loss, gradient = evaluation.gradients_of([0, 1], given)
    torch.testing.assert_close(loss, evaluation.of_ids([0, 1], given))
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5)).to(gradient)
    step = 2e-3  # single precision: norms of some families are computed in it whatever the model's own
    up, down = (evaluation.gradients_of([0, 1], given, sign * step * direction)[0] for sign in (1, -1))
    slope = (gradient * direction).sum((1, 2))
    assert bool((slope.abs() > 0.5).all())
    torch.testing.assert_close((up - down) / (2 * step), slope, rtol=0.02, atol=0.05)


def test_gradients_are_those_of_plain_autograd() -> None:
    import subspace_probe as sp

    model, hf, target = wrapped("llama"), tiny("llama"), half_space(1)
    evaluation = evaluated(model, [text(7, 3)], target, [sp.at(2), sp.at(4)])
    embedded = hf.get_input_embeddings()(evaluation.batch.ids).detach().requires_grad_()
    hidden = deepcopy(hf)(inputs_embeds=embedded, output_hidden_states=True).hidden_states[2][:, -1]
    (own,) = torch.autograd.grad((target.margin - target.score(hidden)).sum(), embedded)
    torch.testing.assert_close(evaluation.gradients_of([0], evaluation.given())[1], own[:, [2, 4]])


def evaluated(model: "HookedModel", prompts: list[str], target: "HalfSpace", free: list[Any]) -> "Evaluation":
    from subspace_probe.interventions.objectives import Evaluation

    return Evaluation(model, model.tokens(prompts), reach(target), free, batch_tokens=64)


def test_a_stopped_pass_gives_the_activation_of_a_full_one() -> None:
    import subspace_probe as sp

    model = wrapped("llama")
    batch = model.tokens([text(6, 1), text(9, 2)])
    full = model.run(batch, reads=[sp.Site(1)]).reads[sp.Site(1)]
    stopped = model.run(batch, reads=[sp.Site(1)], stop_after=sp.Site(1))
    assert stopped.logits is None
    assert torch.equal(full, stopped.reads[sp.Site(1)])


@pytest.mark.parametrize("strategy", ["gradient", "random"])
def test_the_optimum_of_a_small_space_is_found_and_the_loss_is_the_models_own(strategy: Any) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_search import TokenSearch

    model, target = wrapped("llama"), half_space(1, margin=1e4)  # so far away that nothing ends the search early
    prompts = [text(7, 11), text(5, 12)]
    settings = TokenSearch(budget=1000, width=24, top_k=4, patience=2, strategy=strategy)
    found = settings.search(model, prompts, reach(target), [sp.at(-3), sp.at(-1)], allowed=FREE_IDS)
    pairs = torch.cartesian_prod(torch.tensor(FREE_IDS), torch.tensor(FREE_IDS))
    for row, prompt in enumerate(prompts):
        ids = model.tokens([prompt]).ids.repeat(len(pairs), 1)
        ids[:, [-3, -1]] = pairs
        losses = by_hand(tiny("llama"), ids, target)
        assert found.ids[row].tolist() == pairs[int(losses.argmin())].tolist()
        assert float(found.loss[row]) == pytest.approx(float(losses.min()), abs=1e-4)
        assert found.loss[row] <= found.initial[row]
        assert float(losses.median()) > float(losses.min()) + 1  # the control: most pairs are far worse


def test_the_budget_is_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_search import TokenSearch

    model = wrapped("llama")
    spy = Spy(model, monkeypatch)
    settings = TokenSearch(budget=61, width=10, top_k=8, batch_tokens=40)
    objective = reach(half_space(0, 1), half_space(1, 2), weights=(1.0, 0.5))
    found = settings.search(model, [text(7, 1), text(4, 2), text(5, 3)], objective, [sp.at(-2)], banned=range(60, 90))
    assert int(found.rows.sum()) == spy.rows
    assert int(found.gradients.sum()) == spy.gradients
    assert 0 < spy.gradients < spy.rows
    assert found.rows.tolist() == [61, 61, 61]
    assert found.layer_forwards == 2 * (spy.rows + 2 * spy.gradients)  # the deeper target is in the second block
    assert bool((found.found_at <= found.rows).all())


def test_a_target_that_is_met_costs_one_row_and_stays_as_it_is() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_search import TokenSearch

    model, prompts = wrapped("llama"), [text(6, 1), text(6, 2)]
    found = TokenSearch(budget=50).search(model, prompts, reach(half_space(margin=-1e4)), [sp.at(3)])
    assert found.rows.tolist() == [1, 1]
    assert torch.equal(found.ids, model.tokens(prompts).ids[:, [3]])
    assert bool(found.met.all())


def test_banned_and_special_tokens_are_never_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_search import TokenSearch

    model, banned = wrapped("llama"), set(range(20, 128))
    spy = Spy(model, monkeypatch)
    settings = TokenSearch(budget=60, width=12, top_k=30)
    prompts = [text(6, 1), text(8, 2)]  # what they came with may be banned: it is looked at, and not returned
    found = settings.search(model, prompts, reach(half_space()), [sp.at(-2), sp.at(-3)], banned=banned)
    assert set(found.ids.flatten().tolist()) <= set(range(3, 20))
    tried = torch.cat([ids[:, -3:-1].flatten() for ids in spy.ids[1:]])
    assert set(tried.tolist()) <= set(range(3, 20))
    spy.ids.clear()
    settings.search(model, prompts, reach(half_space()), [sp.at(-2), sp.at(-3)])
    free = {int(i) for ids in spy.ids[1:] for i in ids[:, -3:-1].flatten()}
    assert free & banned  # the control: without the ban they are
    assert not free & {0, 1, 2}


def test_a_prompt_is_searched_by_itself() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.token_search import TokenSearch

    model, target, first = wrapped("llama"), half_space(), text(5, 1)
    settings = TokenSearch(budget=80, width=12, top_k=12)
    alone = settings.search(model, [first], reach(target), [sp.at(-2)])
    together = settings.search(model, [first, text(9, 2), text(7, 3)], reach(target), [sp.at(-2)])
    assert torch.equal(alone.ids[0], together.ids[0])
    assert torch.equal(
        together.ids, settings.search(model, [first, text(9, 2), text(7, 3)], reach(target), [sp.at(-2)]).ids
    )
    other = replace(settings, seed=1).search(model, [first], reach(target), [sp.at(-2)])
    assert alone.rows.tolist() == other.rows.tolist()


def test_weighted_targets_and_the_answer_are_the_sums_they_say() -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.objectives import AnswerMargin, Evaluation

    model, hf = wrapped("llama"), tiny("llama")
    one, two = half_space(0, 1, margin=3.0), half_space(1, 2, margin=70.0)
    prompts = [text(6, seed) for seed in range(4)]
    batch = model.tokens(prompts)
    free = [sp.at(1)]
    both = Evaluation(model, batch, reach(one, two, weights=(2.0, 0.25)), free, batch_tokens=16)
    losses = both.of_ids(range(4), both.given())
    torch.testing.assert_close(losses, 2.0 * by_hand(hf, batch.ids, one) + 0.25 * by_hand(hf, batch.ids, two))
    answer, foil = torch.tensor([9, 8, 7, 6]), torch.tensor([20, 21, 22, 23])
    aim = Evaluation(model, batch, AnswerMargin(answer, foil, 40.0), free, batch_tokens=16)
    with torch.no_grad():
        logits = hf(batch.ids).logits[:, -1]
    rows = torch.arange(4)
    torch.testing.assert_close(
        aim.of_ids([2, 0, 3], aim.given()[[2, 0, 3]]), (40 - logits[rows, answer] + logits[rows, foil])[[2, 0, 3]]
    )
    assert (both.depth, aim.depth) == (2, model.spec.n_layers)


def merging() -> Any:
    """A tokenizer that reads "a" and "b" beside each other as one token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijkl"
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {letter: 3 + i for i, letter in enumerate(letters)} | {"ab": 15}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def test_only_complete_sequences_that_survive_as_texts_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.token_search import TokenSearch
    from subspace_probe.models import load_model

    model = load_model(tiny("llama"), tokenizer=merging())
    a, b = 3, 4
    spy = Spy(model, monkeypatch)

    def broken() -> bool:
        # with its neighbours: "a" before the free slots, "b" behind them
        return any(((ids[:, :-1] == a) & (ids[:, 1:] == b)).any() for ids in spy.ids)

    free = [sp.at(2), sp.at(3)]
    settings = TokenSearch(budget=150, width=16, top_k=16)
    settings.search(model, ["caccbd"], reach(half_space()), free)
    assert not broken()
    spy.ids.clear()
    replace(settings, round_trip=False).search(model, ["caccbd"], reach(half_space()), free)
    assert broken()  # the control
    monkeypatch.setattr(model.tokenizer, "batch_decode", lambda rows, **_: ["c"] * len(rows))
    with pytest.raises(ConfigError, match="does not survive being written and read again as it is"):
        settings.search(model, ["caccbd"], reach(half_space()), free)


def test_what_cannot_be_searched_is_refused() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, PositionError, ShapeError, SiteError, StaleStore
    from subspace_probe.interventions.token_search import TokenSearch

    model, target, prompts = wrapped("llama"), half_space(), [text(6, 1), text(8, 2)]
    search: Callable[..., Any] = TokenSearch(budget=20, width=4).search
    with pytest.raises(PositionError, match="Prompt 1 has 8 tokens at all, and prompt 0 has 6"):
        search(model, prompts, reach(target), [sp.ALL])
    with pytest.raises(ConfigError, match="No free positions"):
        search(model, prompts, reach(target), [])
    early = replace(target, where=sp.at(1))
    with pytest.raises(PositionError, match="before every free position"):
        search(model, prompts, reach(early), [sp.at(3)])
    with pytest.raises(ConfigError, match=r"Tokens \[128\] were named"):
        search(model, prompts, reach(target), [sp.at(3)], allowed=[5, 128])
    with pytest.raises(ConfigError, match="No token is left"):
        search(model, prompts, reach(target), [sp.at(3)], allowed=[0, 1])
    with pytest.raises(ShapeError, match="A half-space of width 16"):
        search(model, prompts, reach(half_space(width=16)), [sp.at(3)])
    with pytest.raises(StaleStore, match="another model"):
        search(model, prompts, reach(replace(target, notes={"fingerprint": "0" * 64})), [sp.at(3)])
    with pytest.raises(SiteError, match="at which site"):
        reach(replace(target, site=None))
    with pytest.raises(ConfigError, match="many tokens"):
        reach(replace(target, where=sp.ALL))
    with pytest.raises(ConfigError, match="1 targets and weights"):
        reach(target, weights=(1.0, -1.0))
    with pytest.raises(ConfigError, match="budget"):
        TokenSearch(budget=0)
    assert CONTEXT > 8


# ------------------------------------------------------------------------------------------------ planted overrides
SPACE = 1600
"""Suffixes of two among forty tokens: what an exhaustive search would run."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["override", "override-1", "override-2"])
def test_a_planted_override_is_found(name: str) -> None:
    """Measured on 40 prompts and 3 organisms: found in all of them, after about 50 rows; at random in a tenth."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.eligibility import targets_of
    from subspace_probe.interventions.token_search import TokenSearch
    from subspace_probe.organisms.guarding import FREE, SLOTS, planted_ids

    model = sp.load_model(f"organism:{name}")
    train = sp.load_contrast(f"organism:{name}/requests", split="train", n=96)
    acts = model.capture(train, sites=sp.Site(1), where=sp.LAST)
    (target,) = targets_of(acts, sp.MeanDifference(null_draws=0), [sp.Site(1)])
    prompts = sp.load_contrast(f"organism:{name}/requests", split="test", n=24).where(label=1)
    free = [sp.at(slot) for slot in SLOTS]
    rates: dict[str, float] = {}
    for strategy in ("gradient", "random"):
        settings = TokenSearch(budget=SPACE // 10, strategy=strategy)  # pyright: ignore[reportArgumentType]
        found = settings.search(model, prompts, reach(target), free, allowed=FREE)
        rates[strategy] = float((found.ids == planted_ids()).all(1).double().mean())
        assert int(found.rows.max()) <= SPACE // 10
    assert rates["gradient"] >= 0.9
    assert rates["gradient"] >= rates["random"] + 0.5
