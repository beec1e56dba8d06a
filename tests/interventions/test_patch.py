"""Patching: exact laws, in every backend, and what is refused. The reference is a patch written by hand."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.edits import EditContext
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.models.hooked import HookedModel

BASE = [text(7, seed=i) for i in range(4)]
OTHER = [text(7, seed=10 + i) for i in range(4)]
RAGGED = [text(length, seed=20 + length) for length in (4, 7, 9, 6)]
STREAMS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z", "mlp_post")


@pytest.fixture(scope="module", params=["native", "transformer_lens", "nnsight"])
def model(request: pytest.FixtureRequest) -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("llama"), tokenizer=words(), backend=request.param)


@pytest.fixture(scope="module")
def native() -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("llama"), tokenizer=words())


def captured(model: "HookedModel", prompts: list[str], *sites: Any, where: str = "last") -> "Activations":
    return model.capture(prompts, sites=list(sites), where=where)


def plane(width: int = 32, rank: int = 3, seed: int = 0) -> "Subspace":
    from subspace_probe.core.subspaces import Subspace

    return Subspace.span(torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)))


def by_hand(model: "HookedModel", prompts: list[str], states: dict[Any, Tensor], column: int) -> Tensor:
    """Logits with one column of some sites overwritten, through the primitive alone."""

    def put(given: Tensor) -> Any:
        def edit(x: Tensor, ctx: "EditContext") -> Tensor:
            x = x.clone()
            x[:, column] = given.to(x)
            return x

        return edit

    writes = {site: put(given) for site, given in states.items()}
    logits = model.run(model.tokens(prompts), writes=writes, logits_to_keep=1).logits
    assert logits is not None
    return logits[:, -1]


@pytest.mark.parametrize("stream", STREAMS)
def test_a_patch_is_the_overwriting_of_one_state(model: "HookedModel", stream: Any) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import at
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    site = Site(1, stream)
    source = captured(model, OTHER, site, where="at+3")
    patched = model.logits(BASE, interventions=[Patch(Source.of(source), at(3))])
    torch.testing.assert_close(patched, by_hand(model, BASE, {site: source.at(site)}, 3), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(patched, model.logits(BASE), atol=1e-2)  # control: it does something
    wrong = by_hand(model, BASE, {site: source.at(site)}, 4)
    assert not torch.allclose(patched, wrong, atol=1e-2)  # control: at another token it is another thing


def test_identity_patches_change_nothing_and_a_last_state_is_the_answer(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    sites = [Site(0, "attn_out"), Site(1, "z", 2), Site(-1)]
    clean = model.logits(BASE)
    own = Patch(Source.of(captured(model, BASE, *sites)))
    torch.testing.assert_close(model.logits(BASE, interventions=[own]), clean, rtol=0, atol=1e-5)
    whole = Patch(Source.of(captured(model, OTHER, Site(-1))))
    torch.testing.assert_close(model.logits(BASE, interventions=[whole]), model.logits(OTHER), rtol=0, atol=1e-5)
    assert not torch.allclose(clean, model.logits(OTHER), atol=1e-2)


def test_a_subspace_and_its_complement_add_up_and_a_full_one_is_all(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    site = Site(1)
    source = Source.of(captured(model, OTHER, site))
    full = model.logits(BASE, interventions=[Patch(source)])
    inside, outside = Patch(source, subspace=plane()), Patch(source, subspace=plane(), outside=True)
    for both in ([inside, outside], [outside, inside]):
        torch.testing.assert_close(model.logits(BASE, interventions=both), full, rtol=0, atol=1e-4)
    everything = Patch(source, subspace=plane(rank=32))
    torch.testing.assert_close(model.logits(BASE, interventions=[everything]), full, rtol=0, atol=1e-4)
    one = model.logits(BASE, interventions=[inside])
    assert not torch.allclose(one, full, atol=1e-2)
    state = model.capture(BASE, sites=site, interventions=[inside]).at(site)
    torch.testing.assert_close(state @ plane().basis.T, source.states[site] @ plane().basis.T, rtol=0, atol=1e-4)
    kept = model.capture(BASE, sites=site).at(site)
    torch.testing.assert_close(plane().reject(state), plane().reject(kept), rtol=0, atol=1e-4)


def test_heads_and_several_sites_at_once(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    heads = [Site(1, "z", head) for head in range(4)]
    whole = Site(1, "z")
    each = Patch(Source.of(captured(model, OTHER, *heads)))
    together = Patch(Source.of(captured(model, OTHER, whole)))
    logits = model.logits(BASE, interventions=[each])
    torch.testing.assert_close(logits, model.logits(BASE, interventions=[together]), rtol=0, atol=1e-5)
    one = Patch(Source.of(captured(model, OTHER, *heads), heads[2]))
    assert not torch.allclose(model.logits(BASE, interventions=[one]), logits, atol=1e-2)
    sites = [Site(0, "mlp_out"), Site(1, "attn_out")]
    source = captured(model, OTHER, *sites)
    hand = by_hand(model, BASE, {site: source.at(site) for site in sites}, -1)
    torch.testing.assert_close(model.logits(BASE, interventions=[Patch(Source.of(source))]), hand, rtol=0, atol=1e-4)


def test_each_prompt_gets_its_own_source_in_whatever_order_it_is_run(native: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.interventions.conditions import outcomes
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    patch = Patch(Source.of(captured(native, OTHER, Site(1))))
    one_by_one = [
        native.logits(prompt, interventions=[Patch(Source.of(captured(native, [other], Site(1))))])
        for prompt, other in zip(RAGGED, OTHER, strict=True)
    ]
    wanted = torch.cat(one_by_one)
    for budget in (8192, 10, 1):  # all at once, in pairs of similar length, one by one
        found = native.logits(RAGGED, interventions=[patch], batch_tokens=budget)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    prompts = native_prompts(RAGGED)
    stacked = outcomes(native, prompts, [None, patch], [lambda logits, shown: logits[:, 5]], batch_tokens=16)
    torch.testing.assert_close(stacked[0, 1].float(), wanted[:, 5], rtol=0, atol=1e-4)
    acts = native.capture(RAGGED, sites=Site(2), interventions=[patch], batch_tokens=10)
    assert acts.rows.n == 4


def native_prompts(texts: list[str]) -> Any:
    from subspace_probe.core.prompts import Prompt

    return tuple(map(Prompt, texts))


def test_several_tokens_are_aligned_as_said_and_refused_unsaid(native: "HookedModel") -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, PROMPT
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    site = Site(1)
    source = Source.of(captured(native, OTHER, site, where="all"))
    everything = native.logits(BASE, interventions=[Patch(source, ALL)])
    torch.testing.assert_close(everything, native.logits(OTHER), rtol=0, atol=1e-4)
    with pytest.raises(PositionError, match=r"has . tokens at 'prompt', but its source has 7 .taken at 'all"):
        native.logits(RAGGED, interventions=[Patch(source, PROMPT)])
    clean = native.capture(RAGGED, sites=site, where="all")
    for align in ("start", "end"):
        patch = Patch(source, PROMPT, align=align)
        acts = native.capture(RAGGED, sites=site, where="all", interventions=[patch])
        for i in range(4):
            before, given = clean.at(site)[clean.prompt == i], source.states[site][i * 7 : i * 7 + 7]
            n = min(len(before), 7)
            wanted = before.clone()
            if align == "start":
                wanted[:n] = given[:n]
            else:
                wanted[-n:] = given[-n:]
            torch.testing.assert_close(acts.at(site)[acts.prompt == i], wanted, rtol=0, atol=1e-5)
    last = Source.of(captured(native, OTHER, site))
    acts = native.capture(RAGGED, sites=site, where="all", interventions=[Patch(last, PROMPT, align="repeat")])
    torch.testing.assert_close(acts.at(site), last.states[site][acts.prompt], rtol=0, atol=1e-5)
    with pytest.raises(PositionError, match="only one state can be repeated"):
        native.logits(RAGGED, interventions=[Patch(source, PROMPT, align="repeat")])


def test_means_values_and_resampled_states(native: "HookedModel") -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    site = Site(1)
    acts = captured(native, OTHER, site)
    mean = Source.mean(acts)
    torch.testing.assert_close(mean.states[site][0], acts.at(site).mean(0), rtol=0, atol=1e-6)
    ablated = native.capture(BASE, sites=site, where="all", interventions=[Ablate(to=mean)])
    torch.testing.assert_close(ablated.at(site), mean.states[site].expand(28, -1), rtol=0, atol=1e-6)
    part = native.capture(BASE, sites=site, interventions=[Ablate(plane(), to=mean)]).at(site)
    torch.testing.assert_close(
        plane().project(part), plane().project(mean.states[site]).expand(4, -1), rtol=0, atol=1e-5
    )
    zero = native.logits(BASE, interventions=[Ablate(sites=site)])
    value = Patch(Source.value(site, torch.zeros(32)), ALL)
    torch.testing.assert_close(native.logits(BASE, interventions=[value]), zero, rtol=0, atol=1e-5)
    drawn = Source.resampled(acts, seed=3)
    order = [int((acts.at(site) == row).all(1).nonzero()) for row in drawn.states[site]]
    assert sorted(order) == [0, 1, 2, 3]
    assert all(i != j for i, j in enumerate(order))
    whole = captured(native, OTHER, site, where="all")
    rows = Source.resampled(whole, seed=1).states[site].view(4, 7, -1)
    for i in range(4):  # all of another prompt's rows, together and in their order
        assert [j for j in range(4) if torch.equal(rows[i], whole.at(site).view(4, 7, -1)[j])] not in ([], [i])
    with pytest.raises(DataError, match="4 prompts with 4 to 9 rows"):
        Source.resampled(captured(native, RAGGED, site, where="all"))


def test_directional_ablation_is_ablation_of_the_subspace_to_zero(native: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    zero = Patch(Source.value(Site(1), torch.zeros(32)), ALL, plane())
    once = native.logits(BASE, interventions=[Ablate(plane(), Site(1))])
    torch.testing.assert_close(once, native.logits(BASE, interventions=[zero]), rtol=0, atol=1e-5)
    assert not torch.allclose(once, native.logits(BASE, interventions=[Ablate(plane())]), atol=1e-2)


def test_generation_under_a_patch_is_the_same_with_and_without_a_cache(native: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, PROMPT
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    sources = [
        Patch(Source.of(captured(native, OTHER, Site(1)))),
        Patch(Source.of(captured(native, OTHER, Site(1), where="all")), ALL, align="end"),
        Patch(Source.value(Site(1), torch.ones(32)), ALL),
    ]
    long = native.capture([text(9, seed=i) for i in range(4)], sites=Site(1), where=ALL)
    for align in ("start", "end"):  # what is longer than a prompt is not for the tokens it generates
        patches = [Patch(Source.of(long), where, align=align) for where in (ALL, PROMPT)]
        texts = [native.generate(RAGGED[:1], interventions=[patch], max_new_tokens=8) for patch in patches]
        assert texts[0] == texts[1]
    for patch in sources:
        cached = native.generate(RAGGED, interventions=[patch], max_new_tokens=6)
        assert cached == native.generate(RAGGED, interventions=[patch], max_new_tokens=6, use_cache=False)
        assert cached != native.generate(RAGGED, max_new_tokens=6)


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(native: "HookedModel") -> None:
    from subspace_probe.core.errors import ConfigError, DataError, PositionError, ShapeError, SiteError, StaleStore
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import GENERATED
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source
    from subspace_probe.models import load_model

    site = Site(1)
    clean = native.logits(BASE)
    other = load_model(tiny("llama", initializer_range=0.2), tokenizer=words())
    foreign = Source.of(captured(other, OTHER, site))
    with pytest.raises(StaleStore, match=r"captured from .* Capture them from this model"):
        native.logits(BASE, interventions=[Patch(foreign)])
    native.logits(BASE, interventions=[Patch(foreign.for_any_model())])
    acts = captured(native, OTHER, site)
    with pytest.raises(SiteError, match=r"L2\.resid_post was asked for, but these activations hold L1"):
        Source.of(acts, Site(2))
    with pytest.raises(SiteError, match=r"the source holds L1\.resid_post"):
        native.logits(BASE, interventions=[Ablate(to=Source.of(acts), sites=Site(2))])
    with pytest.raises(DataError, match="prompts 0 to 3, but the call has a prompt number 4"):
        native.logits([*BASE, BASE[0]], interventions=[Patch(Source.of(acts))])
    with pytest.raises(ShapeError, match="16 wide"):
        native.logits(BASE, interventions=[Patch(Source.value(site, torch.zeros(16)))])
    with pytest.raises(ShapeError, match=r"not finite in rows \[0\]"):
        Source.value(site, torch.full((32,), float("nan")))
    with pytest.raises(SiteError, match="no site in particular"):
        Ablate()
    with pytest.raises(ConfigError, match="outside of no subspace"):
        Patch(Source.of(acts), outside=True)
    with pytest.raises(ShapeError, match="width 8 was used where the activations have width 32"):
        native.logits(BASE, interventions=[Patch(Source.of(acts), subspace=Subspace.span(torch.ones(8)))])
    with pytest.raises(PositionError, match="touches no token"):
        native.logits(BASE, interventions=[Patch(Source.of(acts), GENERATED)])
    with pytest.raises(PositionError, match="touches no token"):
        native.capture(BASE, interventions=[Patch(Source.of(acts), GENERATED)])
    assert torch.equal(native.logits(BASE), clean)
