"""Distributed alignment search: exact where theory says what is exact, and honest about what it finds."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import LAYERS, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.finders.interchange import Interchange
    from subspace_probe.models.hooked import HookedModel

WORDS = tuple(f"w{i}" for i in range(10, 18))


@pytest.fixture(scope="module")
def model() -> "HookedModel":
    import copy

    import subspace_probe as sp

    # a copy: asked for hidden states, Transformers puts hooks on a model that stay
    return sp.load_model(copy.deepcopy(tiny("llama")), tokenizer=words())


@pytest.fixture(scope="module")
def organism() -> "HookedModel":
    import subspace_probe as sp

    return sp.load_model("organism:chat")


def contrast(n: int = 24, seed: int = 0) -> "Contrast":
    """Prompts of unequal length whose answers mean nothing."""
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for row in range(n):
        length = 3 + row % 4
        chosen = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist()]
        prompts.append(Prompt(text=" ".join(chosen), answer=WORDS[row % 3], foil=WORDS[3 + row % 3]))
    return Contrast("words", tuple(prompts), tuple(i % 2 for i in range(n)))


def interchange(model: "HookedModel", layer: int = 0, position: str = "last", stream: str = "resid_post") -> Any:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import Where
    from subspace_probe.finders.interchange import Interchange

    return Interchange(
        model, contrast(), Site.parse(f"L{layer}.{stream}"), Where.parse(position), range(24), batch_size=9
    )


def naive_logits(model: "HookedModel", layer: int, basis: Tensor, base: str, source: str, *, place: int) -> Tensor:
    """One prompt at a time through Transformers with a plain hook on the block: nothing of this package is used."""
    hf, tokenizer = model.backend.hf, model.tokenizer
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in (base, source)]
    with torch.no_grad():
        states = [hf(i, output_hidden_states=True).hidden_states[layer + 1][0] for i in ids]
        delta = (states[1][place] - states[0][place]) @ basis.T @ basis

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[0, place] += delta
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = hf.model.layers[layer].register_forward_hook(hook)
        try:
            return hf(ids[0]).logits[0, -1]
        finally:
            handle.remove()


# --------------------------------------------------------------------------------------------------------- the exchange
@pytest.mark.parametrize(("position", "place"), [("last", -1), ("at+1", 1)])
def test_an_exchange_is_what_a_plain_hook_does(model: "HookedModel", position: str, place: int) -> None:
    from subspace_probe.finders.interchange import within

    task, layer = interchange(model, 0, position), 0
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(1)))[0].T
    sources = task.sources(same=0.0, seed=0)
    texts = [prompt.text for prompt in contrast().prompts]
    done = 0
    for chunk, drawn in zip(task.chunks, task.split(sources), strict=True):
        found = task.logits(chunk, drawn, within(basis[None]))[0]
        for row, source, logits in zip(chunk.rows.tolist(), drawn.tolist(), found, strict=True):
            wanted = naive_logits(model, layer, basis, texts[row], texts[source], place=place)
            assert torch.allclose(logits, wanted, atol=2e-4 * float(wanted.abs().max()))
            other = naive_logits(model, layer, basis, texts[row], texts[row], place=place)
            done += not torch.allclose(logits, other, atol=1e-3)  # control: it does change something
    assert done > 12


def test_a_full_basis_exchanges_the_whole_state_and_an_empty_mask_nothing(model: "HookedModel") -> None:
    from subspace_probe.finders.interchange import unchanged, whole, within

    task = interchange(model)
    sources = task.sources(same=0.3, seed=1)
    full = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))[0]
    for change, same in ((within(full[None]), whole), (within(full[None], torch.zeros(1, 32)), unchanged)):
        found, expected = (task.score(c, sources, task.labels[None])[0] for c in (change, same))
        assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(*(task.score(c, sources, task.labels[None])[0] for c in (whole, unchanged)), atol=0.01)


def test_sources_have_the_other_label_or_as_often_as_asked_the_same(model: "HookedModel") -> None:
    task = interchange(model)
    for same in (0.0, 1.0):
        sources = task.sources(same=same, seed=3)
        assert torch.equal(task.labels[sources] == task.labels[task.bases], torch.full((24,), bool(same)))
    many = torch.cat([task.sources(same=0.25, seed=seed) for seed in range(40)])
    share = (task.labels[many] == task.labels[task.bases].repeat(40)).float().mean()
    assert abs(float(share) - 0.25) < 0.05


def test_a_base_should_answer_as_its_partner_with_the_other_label(model: "HookedModel") -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import DataError
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.finders.interchange import answer_ids

    plain = contrast(4)
    paired = replace(plain, pairs=(0, 0, 1, 2))
    ids = {word: model.token_ids([word])[0] for word in WORDS}
    found = answer_ids(model, paired)
    # rows 0 and 1 are partners; 2 and 3 have none, so their foils count
    a, b, c, d, _, f, *_ = WORDS
    said = [(a, b), (a, b), (c, f), (d, a)]
    assert found.tolist() == [[ids[x], ids[y]] for x, y in said]
    silent = replace(plain, prompts=(*plain.prompts[:3], Prompt(text="w20 w21", answer=a)))
    with pytest.raises(DataError, match="Prompt 3 of 'words' says not what to answer"):
        answer_ids(model, silent)


# ------------------------------------------------------------------------------------------------- training and starts
def naive_gradients(task: "Interchange", sources: Tensor) -> tuple[Tensor, Tensor]:
    """Differences and gradients of the log-probability of the wanted answer, one prompt at a time, without a prefix."""
    from subspace_probe.core.edits import At

    prompts = contrast().prompts
    moves, gradients = [], []
    for base, source in zip(task.bases.tolist(), sources.tolist(), strict=True):
        added = torch.zeros(1, 32, requires_grad=True)
        writes = {task.site: At(task.where, lambda x, rows, added=added: x + added)}
        logits = task.model.run(task.model.tokens([prompts[base]]), writes=writes, grad=True).logits
        assert logits is not None
        token = int(task.answers[base, task.labels[source]])
        gradients.append(torch.autograd.grad(logits[0, -1].log_softmax(-1)[token], added)[0][0])
        moves.append(task.states[source] - task.states[base])
    return torch.stack(moves).double(), torch.stack(gradients).double()


def test_the_linearised_start_is_the_closed_form(model: "HookedModel") -> None:
    from subspace_probe.finders.interchange_training import linearised

    task = interchange(model, 1)
    d, g = naive_gradients(task, task.sources(same=0.0, seed=0))
    matrix = (d.T @ g + g.T @ d) / 2 / len(d)
    wanted = torch.linalg.eigh(matrix)[1].flip(1)[:, :3].T
    found = linearised(task, 3, seed=0).double()
    assert torch.allclose(found @ found.T, torch.eye(3).double(), atol=1e-5)
    assert torch.allclose(found.T @ found, wanted.T @ wanted, atol=1e-3)
    least = linearised(task, 3, least=True, seed=0).double()
    wanted = torch.linalg.eigh(matrix)[1][:, :3].T
    assert torch.allclose(least.T @ least, wanted.T @ wanted, atol=1e-3)
    # its first direction beats every other one to first order, as the closed form says
    gain = torch.einsum("nd,nd->n", d @ found[:1].T @ found[:1], g).mean()
    random = torch.nn.functional.normalize(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)).double())
    assert gain >= ((d @ random.T) * (g @ random.T)).mean(0).max() - 1e-9


def test_the_mask_of_a_learned_boundary_keeps_whole_coordinates() -> None:
    from subspace_probe.finders.interchange_training import _mask

    for kept in range(1, 8):
        edge = torch.tensor([kept / 8]).logit()
        mask, share = _mask(edge, 8, 1.0, 1.0)
        wanted = (torch.arange(8) < kept).float()
        assert torch.allclose(mask[0], wanted, atol=1e-4)  # the first one too: it is not one half
        assert float(share) == pytest.approx(kept / 8)
    soft, _ = _mask(torch.zeros(1), 8, 0.0, 1.0)
    assert 0.1 < float(soft[0, -1]) < 0.5  # control: at the start it is soft


def test_arms_share_passes_and_nothing_else(model: "HookedModel") -> None:
    from subspace_probe.finders.interchange_training import Schedule, train

    task, settings = interchange(model), Schedule(6, same=0.25)
    start = torch.linalg.qr(torch.randn(3, 32, 2, generator=torch.Generator().manual_seed(0)))[0].mT
    labels = torch.stack([task.labels, 1 - task.labels, task.labels])
    together = train(settings, task, labels, start).bases
    for arm in range(3):
        alone = train(settings, task, labels[arm : arm + 1], start[arm : arm + 1]).bases[0]
        assert torch.allclose(alone.T @ alone, together[arm].T @ together[arm], atol=1e-3)
    assert not torch.allclose(together[0].T @ together[0], together[2].T @ together[2], atol=0.05)
    assert not torch.allclose(together[0].T @ together[0], start[0].T @ start[0], atol=0.05)


# ------------------------------------------------------------------------------------------------------ on the organism
@pytest.fixture(scope="module")
def knob() -> "Contrast":
    import subspace_probe as sp

    return sp.load_contrast("organism:chat/knob", split="train", n=128)


@pytest.fixture(scope="module")
def found(organism: "HookedModel", knob: "Contrast") -> Any:
    import subspace_probe as sp
    from subspace_probe.finders.das import DAS

    truth = sp.organisms.load_truth("chat").planted("intent")
    return truth, DAS(steps=60, restarts=1).fit(organism, knob, truth.site, truth.where)


@pytest.mark.slow
def test_finds_a_subspace_that_carries_the_planted_variable(found: Any) -> None:
    truth, subspace = found
    notes = subspace.notes
    assert subspace.found
    # an equivalent direction, not the planted one itself: 0.94 to 0.98 over the organism's three variables
    assert float(subspace.unit @ truth.vector) > 0.9
    assert notes["iia"]["estimate"] >= 0.95
    assert notes["kept"]["estimate"] >= 0.95
    assert notes["accuracy"]["low"] > notes["control_labels"]["high"]
    assert notes["accuracy"]["low"] > notes["control_weights"]["high"]
    assert notes["floor"]["estimate"] == pytest.approx(0.5, abs=0.05)  # what should be kept is kept, and nothing moves
    assert len(notes["angles_between_starts"]) == 1
    assert notes["fingerprint"]
    assert notes["data_hash"]


@pytest.mark.slow
def test_reads_and_writes_what_it_says(found: Any, organism: "HookedModel", knob: "Contrast") -> None:
    _, subspace = found
    acts = organism.capture(knob, sites=[subspace.site], where=subspace.where)
    coords = subspace.coords(acts.at(subspace.site))[:, 0]
    means = [float(coords[acts.labels == label].mean()) for label in (0, 1)]
    assert means[1] > 0 > means[0]
    assert means[1] - means[0] == pytest.approx(float(subspace.scale[0]), rel=0.2)


@pytest.mark.slow
def test_without_a_variable_nothing_is_found(organism: "HookedModel", knob: "Contrast") -> None:
    """Control of the finding: labels by coin, so that no state carries them, and answers that go with the labels."""
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.finders.das import DAS

    truth = sp.organisms.load_truth("chat").planted("intent")
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(2, (len(knob),), generator=generator).tolist()
    prompts = tuple(
        replace(p, answer=p.foil, foil=p.answer) if label != own else p
        for p, own, label in zip(knob.prompts, knob.labels, labels, strict=True)
    )
    coin = replace(knob, prompts=prompts, labels=tuple(labels), pairs=tuple(range(len(knob))))
    fit = DAS(steps=60, restarts=1, controls=("labels",)).fit(organism, coin, truth.site, truth.where)
    assert not fit.found
    assert fit.notes["accuracy"]["estimate"] < 0.75


@pytest.mark.slow
def test_a_boundary_takes_the_rank_down_to_what_is_needed(organism: "HookedModel", knob: "Contrast") -> None:
    import subspace_probe as sp
    from subspace_probe.finders.das import DAS

    truth = sp.organisms.load_truth("chat").planted("intent")
    settings: dict[str, Any] = {"rank": 6, "steps": 120, "restarts": 0, "controls": ()}
    small = DAS(boundary=2.0, **settings).fit(organism, knob, truth.site, truth.where)
    assert small.rank < 4
    assert small.notes["iia"]["estimate"] >= 0.95
    assert float(small.project(small.origin + truth.vector).norm()) > 0.85
    assert DAS(**settings).fit(organism, knob, truth.site, truth.where).rank == 6


@pytest.mark.slow
def test_the_order_of_the_prompts_changes_nothing(organism: "HookedModel", knob: "Contrast") -> None:
    import subspace_probe as sp
    from subspace_probe.finders.das import DAS

    truth = sp.organisms.load_truth("chat").planted("intent")
    order = torch.randperm(len(knob), generator=torch.Generator().manual_seed(1)).tolist()
    settings = DAS(steps=10, restarts=0, controls=())
    a, b = (settings.fit(organism, c, truth.site, truth.where) for c in (knob, knob.take(order)))
    assert torch.allclose(a.unit, b.unit, atol=1e-4)


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
@pytest.mark.slow
def test_every_backend_trains_the_same_subspace(backend: str, model: "HookedModel") -> None:
    import subspace_probe as sp
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.finders.das import DAS

    other = sp.load_model(model.backend.hf, tokenizer=model.tokenizer, backend=backend)
    settings = DAS(steps=5, restarts=0, controls=())
    a, b = (settings.fit(m, contrast(), Site(0), LAST) for m in (model, other))
    assert a.overlap(b) > 0.999


# ----------------------------------------------------------------------------------------------------- what is refused
def test_bad_requests_say_what_to_do(model: "HookedModel") -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import ConfigError, DataError, PositionError, RankError, SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, LAST
    from subspace_probe.finders.das import DAS

    with pytest.raises(ConfigError, match=r"weight_decay=0\.01 was given"):
        DAS(weight_decay=0.01)
    with pytest.raises(ConfigError, match="Counts are at least 1"):
        DAS(steps=0)
    with pytest.raises(ConfigError, match="0 <= same < 1"):
        DAS(same=1.0)
    das, data = DAS(steps=1, restarts=0, controls=()), contrast()
    with pytest.raises(RankError, match=r"Rank 33 was asked for at L0\.resid_post, which is 32 wide"):
        DAS(rank=33).fit(model, data, Site(0), LAST)
    with pytest.raises(PositionError, match="exchanges one token a prompt, not 'all'"):
        das.fit(model, data, Site(0), ALL)
    with pytest.raises(SiteError, match=f"Nothing that is computed from L{LAYERS - 1}.resid_post at last-1 reaches"):
        das.fit(model, data, Site(LAYERS - 1), LAST.offset(-1))
    with pytest.raises(DataError, match="has 8 prompts; DAS needs at least 16"):
        das.fit(model, data.take(list(range(8))), Site(0), LAST)
    with pytest.raises(DataError, match=r"0 positive \(label 1\)"):
        das.fit(model, replace(data, labels=(0,) * 24), Site(0), LAST)
    same = replace(data, prompts=tuple(replace(p, foil=p.answer) for p in data.prompts))
    with pytest.raises(DataError, match="answers otherwise under its other label"):
        das.fit(model, same, Site(0), LAST)


@pytest.mark.slow
def test_a_fresh_copy_has_learned_nothing_and_leaves_the_model_alone(organism: "HookedModel") -> None:
    import subspace_probe as sp
    from subspace_probe.models.reinitialised import reinitialised

    before, state = organism.fingerprint, torch.get_rng_state()
    fresh, again, other = (reinitialised(organism, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert organism.fingerprint == before
    assert fresh.fingerprint == again.fingerprint
    assert len({before, fresh.fingerprint, other.fingerprint}) == 3
    assert fresh.spec.n_layers == organism.spec.n_layers
    test = sp.load_contrast("organism:chat/facts", n=32)
    right = {
        name: sum(int(m.logits([p]).argmax()) == m.token_ids([p.answer])[0] for p in test.prompts if p.answer)
        for name, m in (("trained", organism), ("fresh", fresh))
    }
    assert right["trained"] >= 30
    assert right["fresh"] <= 4
