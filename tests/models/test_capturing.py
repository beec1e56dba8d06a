"""The capture engine: the right rows in the right order, and nothing else computed."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import LAYERS, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.captures import Part, Plan
    from subspace_probe.core.sites import Site
    from subspace_probe.models.hooked import HookedModel

PROMPTS = [text(1 + (7 * i) % 13, seed=i) for i in range(50)]


@pytest.fixture
def model() -> "HookedModel":
    from subspace_probe.models import load_model

    return load_model(tiny("qwen2"), tokenizer=words())


def naive(model: "HookedModel", site: "Site", where: str) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """One prompt a pass, everything kept, the tokens picked by hand."""
    rows, places = list[Tensor](), list[tuple[int, int]]()
    for index, prompt in enumerate(PROMPTS):
        states = model.run(model.tokens(prompt), reads=[site]).reads[site][0]
        n = len(states)
        chosen = {"all": range(n), "last": [n - 1], "at+0": [0], "prompt": range(n)}[where]
        rows += [states[i] for i in chosen]
        places += [(index, i) for i in chosen]
    return rows, places


@pytest.mark.parametrize("where", ["all", "last", "at+0"])
@pytest.mark.parametrize("limits", [{}, {"batch_tokens": 1}, {"batch_tokens": 40}, {"batch_size": 3}])
def test_rows_are_those_of_one_prompt_at_a_time(
    model: "HookedModel", monkeypatch: pytest.MonkeyPatch, where: str, limits: dict[str, int]
) -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.models import capturing

    site = Site(1, "attn_out")
    wanted, places = naive(model, site, where)
    for window, part in ((1024, 2**26), (7, 2**26), (1024, 500), (16, 1)):
        monkeypatch.setattr(capturing, "WINDOW", window)
        monkeypatch.setattr(capturing, "PART_BYTES", part)
        acts = model.capture(PROMPTS, sites=[site, Site(0)], where=where, **limits)
        assert list(zip(acts.prompt.tolist(), acts.position.tolist(), strict=True)) == places
        torch.testing.assert_close(acts.at(site), torch.stack(wanted), rtol=0, atol=1e-5)
        assert acts.sites == (Site(0), site)


def test_rows_in_another_order_would_be_noticed(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site

    acts = model.capture(PROMPTS, sites=Site(1), where="last").at(Site(1))
    assert not torch.allclose(acts, acts.roll(1, 0), atol=1e-2)


def fired(modules: dict[str, Any]) -> tuple[dict[str, int], list[Any]]:
    """How often modules run, and the handles of what counts."""
    counts = dict.fromkeys(modules, 0)

    def counting(name: str) -> Any:
        return lambda *args: counts.update({name: counts[name] + 1})

    return counts, [module.register_forward_hook(counting(name)) for name, module in modules.items()]


def test_nothing_behind_the_deepest_site_runs(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site

    hf = model.backend.hf
    blocks = {f"block {i}": hf.model.layers[i] for i in range(LAYERS)}
    counts, handles = fired({**blocks, "norm": hf.model.norm, "head": hf.lm_head, "mlp 1": hf.model.layers[1].mlp})
    try:
        model.capture(PROMPTS[:4], sites=Site(-1))
        assert counts["block 1"] == 1
        assert counts["norm"] == counts["head"] == 0
        model.capture(PROMPTS[:4], sites=[Site(0), Site(1, "attn_out")])
        assert counts["block 0"] == 2
        assert (counts["mlp 1"], counts["block 2"]) == (1, 1)
        model.logits(PROMPTS[:4])  # a control: the counters do count
        assert counts["norm"] == counts["head"] == 1
    finally:
        for handle in handles:
            handle.remove()


def test_only_the_tokens_asked_for_leave_the_hooks(model: "HookedModel") -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST

    batch = model.tokens(PROMPTS[:6])
    whole = model.run(batch, reads=[Site(1), Site(2, "z", 3)])
    some = model.run(batch, reads=[Site(1), Site(2, "z", 3)], where=LAST, dtype=torch.float64)
    for site, states in whole.reads.items():
        assert some.reads[site].shape == (6, states.shape[-1])
        assert some.reads[site].dtype == torch.float64
        assert torch.equal(some.reads[site], states[:, -1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_cache_has_the_dtype_asked_for(model: "HookedModel", dtype: torch.dtype) -> None:
    from subspace_probe.core.captures import Memory
    from subspace_probe.core.sites import Site

    plain = model.capture(PROMPTS, sites=Site(1)).at(Site(1))
    found = model.capture(PROMPTS, sites=Site(1), dtype=dtype, into=Memory("cpu")).at(Site(1))
    assert plain.dtype == torch.float32
    assert torch.equal(found, plain.to(dtype))


def test_the_cache_is_where_it_was_asked_for(model: "HookedModel") -> None:
    from subspace_probe.core.captures import Memory
    from subspace_probe.core.sites import Site

    acts = model.capture(PROMPTS, sites=Site(1), into=Memory("meta"))  # the one other device there always is
    assert acts.at(Site(1)).device.type == "meta"


class Measured:
    """A sink that keeps nothing but the size of what it was given at a time."""

    def __init__(self) -> None:
        self.largest = self.total = 0

    def record(self, plan: "Plan") -> Any:
        from contextlib import nullcontext

        return nullcontext(self)

    def has(self, index: int) -> bool:
        return False

    def write(self, index: int, part: "Part", rows: Any) -> None:
        size = sum(states.untyped_storage().nbytes() for states in rows.values())
        self.largest, self.total = max(self.largest, size), self.total + size

    def finish(self) -> Any:
        from subspace_probe.core.activations import Activations, MemoryRows
        from subspace_probe.core.contrasts import Contrast
        from subspace_probe.core.sites import Site
        from subspace_probe.core.tokens import ALL

        empty = torch.zeros(0).long()
        return Activations(MemoryRows({Site(0): torch.zeros(0, 1)}), Contrast("", (), ()), empty, empty, ALL)


@pytest.mark.slow
def test_what_is_held_at_a_time_does_not_grow_with_the_prompts(
    model: "HookedModel", monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.models import capturing

    monkeypatch.setattr(capturing, "PART_BYTES", 2**14)
    few, many = Measured(), Measured()
    model.capture(PROMPTS * 4, where="all", batch_tokens=64, into=few)
    model.capture(PROMPTS * 40, where="all", batch_tokens=64, into=many)
    assert many.total == 10 * few.total
    assert many.largest <= max(2**14 + 13 * 32 * 4 * LAYERS, 77 * 32 * 4 * LAYERS)
    assert many.largest < few.total / 5


def test_prompts_are_tokenised_once_or_a_window_at_a_time(
    model: "HookedModel", monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.models import capturing

    sizes = list[int]()
    tokens = type(model).tokens

    def counting(self: Any, prompts: Any) -> Any:
        sizes.append(len(prompts))
        return tokens(self, prompts)

    monkeypatch.setattr(type(model), "tokens", counting)
    model.capture(PROMPTS)
    assert sizes == [50]
    monkeypatch.setattr(capturing, "WINDOW", 20)
    model.capture(PROMPTS)
    assert sizes[1:] == [20, 20, 10, 20, 20, 10]


def test_bad_limits_positions_and_prompts_are_refused_before_a_pass(
    model: "HookedModel", monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.core.errors import ConfigError, DataError, PositionError, UnsupportedSite
    from subspace_probe.models import capturing

    monkeypatch.setattr(capturing, "WINDOW", 4)
    counts, (handle,) = fired({"block": model.backend.hf.model.layers[0]})
    try:
        for limits in ({"batch_tokens": 0}, {"batch_size": 0}):
            with pytest.raises(ConfigError, match="at least one of each"):
                model.capture(PROMPTS, **limits)
        with pytest.raises(PositionError, match=r"no position 'at\+12'"):
            model.capture(PROMPTS, where="at+12")
        with pytest.raises(PositionError, match="No token of these prompts is 'generated'"):
            model.capture(PROMPTS, where="generated")
        with pytest.raises(DataError, match="context"):
            model.capture([*PROMPTS, text(100, seed=0)])
        with pytest.raises(UnsupportedSite, match="attn_implementation='eager'"):
            model.capture(PROMPTS, sites="L1.pattern")
        assert counts["block"] == 0
    finally:
        handle.remove()


def test_an_empty_list_of_prompts(model: "HookedModel") -> None:
    from subspace_probe.core.errors import DataError

    with pytest.raises(DataError, match="no prompts"):
        model.capture([])
