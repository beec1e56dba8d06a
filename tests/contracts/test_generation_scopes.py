"""Steering while generating: a batch of ragged prompts, cache on and off, against a loop that is as plain as can be.

The loop runs one prompt at a time, the whole text in every pass, with hooks of Torch written here. It is told by
numbers which tokens to change, so it shares nothing with the package but the weights and the tokenizer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from subspace_probe.core.protocols import Intervention
    from subspace_probe.models.hooked import HookedModel

pytestmark = pytest.mark.slow

PROMPTS = [
    "i need to dry this rice soon",
    "please wash the stone",
    "tell me how to wash the stone , but you must say no",
    "we should dry the rice tomorrow",
]
NEW, LAYER, BELOW = 6, 1, 0
CLOSE_CALL = 1e-3  # logits nearer than this could be ordered otherwise in a batch: no scope here may depend on it

Scope = Callable[[int, int, int], bool]
Change = Callable[[Tensor, int], Tensor]


def vector(seed: int) -> Tensor:
    drawn = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


U, PROBE = vector(0), vector(1)


@dataclass(frozen=True)
class Written:
    """What the loop does: at which tokens (position, prompt length, instruction's end), and what it does to them."""

    scope: Scope
    change: Change
    token_rule: bool = False
    prompt_rule: bool = False


def everywhere(position: int, length: int, inst: int) -> bool:
    return True


SCOPES: dict[str, Scope] = {
    "all": everywhere,
    "prompt": lambda p, n, inst: p < n,
    "generated": lambda p, n, inst: p >= n,
    "last": lambda p, n, inst: p == n - 1,
    "t_inst": lambda p, n, inst: p == inst,
    "after:t_inst": lambda p, n, inst: p > inst,
    "step+0": lambda p, n, inst: p == n,
    "step+2": lambda p, n, inst: p == n + 2,
}
STRENGTHS = (0.0, 18.0, 24.0, -20.0)


def strength(name: str) -> float:
    return 30.0 if name.startswith("step") else 18.0


def add(strength: float) -> Change:
    return lambda h, prompt: h + strength * U


def normed(h: Tensor, prompt: int) -> Tensor:
    moved = h + 18.0 * U
    return moved / moved.norm() * h.norm()


WRITTEN: dict[str, Written] = {
    **{name: Written(scope, add(strength(name))) for name, scope in SCOPES.items()},
    "rows": Written(everywhere, lambda h, prompt: h + STRENGTHS[prompt] * U),
    "norm": Written(everywhere, lambda h, prompt: h + 1.4 * h.norm() * U),
    "keep_norm": Written(everywhere, normed),
    "clamp": Written(lambda p, n, inst: p >= n - 1, lambda h, prompt: h + (15.0 - h @ U) * U),
    "at_least": Written(everywhere, lambda h, prompt: h + max(18.0 - float(h @ U), 0.0) * U),
    "token rule": Written(everywhere, add(18.0), token_rule=True),
    "prompt rule": Written(everywhere, add(18.0), prompt_rule=True),
}


def package(name: str) -> "Intervention":
    """The same as the package says it."""
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import LAST, T_INST, Where, after
    from subspace_probe.interventions.knob import KnobClamp
    from subspace_probe.interventions.rules import Score
    from subspace_probe.interventions.steer import Steer

    site = Site(LAYER)
    direction, probe = (Subspace.span(v, site=site) for v in (U, PROBE))
    special: dict[str, Callable[[], Intervention]] = {
        "rows": lambda: Steer(direction, STRENGTHS),
        "norm": lambda: Steer(direction, 1.4, unit="norm"),
        "keep_norm": lambda: Steer(direction, 18.0, keep_norm=True),
        "clamp": lambda: KnobClamp(direction, 15.0, where=after(LAST.offset(-1))),
        "at_least": lambda: KnobClamp(direction, 18.0, bound="at_least"),
        "token rule": lambda: Steer(direction, 18.0, when=Score(probe, 0.0, site=Site(BELOW))),
        "prompt rule": lambda: Steer(direction, 18.0, when=Score(probe, THRESHOLD, where=T_INST)),
    }
    if name in special:
        return special[name]()
    return Steer(direction, strength(name), where=Where.parse(name))


THRESHOLD = 0.0


@cache
def hf_and_tokenizer() -> tuple[Any, Any]:
    import subspace_probe as sp

    model = sp.load_model("organism:chat")
    return model.backend.hf, model.tokenizer


def ids_of(text: str) -> list[int]:
    _, tokenizer = hf_and_tokenizer()
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(shown, add_special_tokens=False)["input_ids"]


@cache
def behind_the_instruction() -> int:
    """How many tokens the template puts behind the instruction: the end that all prompts share."""
    a, b = ids_of("please sweep"), ids_of("the floor")
    return next(i for i in range(len(a)) if a[-1 - i] != b[-1 - i])


@cache
def loop(name: str) -> tuple[tuple[str, ...], float]:
    """The texts, and by how much the winning logit ever won."""
    hf, tokenizer = hf_and_tokenizer()
    written = WRITTEN.get(name, Written(lambda p, n, inst: False, lambda h, prompt: h))
    texts: list[str] = []
    margin = float("inf")
    for row, text in enumerate(PROMPTS):
        ids = ids_of(text)
        length, inst = len(ids), len(ids) - behind_the_instruction() - 1
        below: dict[str, Tensor] = {}

        def see(module: Any, args: Any, output: Any, below: dict[str, Tensor] = below) -> None:
            below["h"] = output[0] if isinstance(output, tuple) else output

        def edit(
            module: Any,
            args: Any,
            output: Any,
            below: dict[str, Tensor] = below,
            row: int = row,
            length: int = length,
            inst: int = inst,
        ) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            allowed = not written.prompt_rule or float(h[0, inst] @ PROBE) >= THRESHOLD
            for p in range(h.shape[1]):
                judged = not written.token_rule or float(below["h"][0, p] @ PROBE) >= 0
                if allowed and judged and written.scope(p, length, inst):
                    h[0, p] = written.change(h[0, p], row)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles = [
            hf.model.layers[BELOW].register_forward_hook(see),
            hf.model.layers[LAYER].register_forward_hook(edit),
        ]
        try:
            produced: list[int] = []
            with torch.no_grad():
                for _ in range(NEW):
                    logits = hf(torch.tensor([ids + produced]), use_cache=False).logits[0, -1]
                    top = logits.topk(2).values
                    margin = min(margin, float(top[0] - top[1]))
                    produced.append(int(logits.argmax()))
                    if produced[-1] == hf.generation_config.eos_token_id:
                        break
        finally:
            for handle in handles:
                handle.remove()
        texts.append(tokenizer.decode(produced, skip_special_tokens=True).strip())
    return tuple(texts), margin


def generated(model: "HookedModel", name: str, **options: Any) -> tuple[str, ...]:
    return tuple(model.generate(PROMPTS, interventions=[package(name)], max_new_tokens=NEW, **options))


@pytest.mark.parametrize("name", WRITTEN)
def test_every_scope_is_the_loops(chat: "HookedModel", name: str) -> None:
    texts, margin = loop(name)
    assert margin > CLOSE_CALL
    assert texts != loop("nothing")[0]
    assert generated(chat, name) == texts
    assert generated(chat, name, use_cache=False) == texts
    assert generated(chat, name, batch_tokens=24) == texts  # prompts in other batches, in another order


def test_the_scopes_differ() -> None:
    """A control: the texts tell the scopes apart, so that taking one for another would be seen."""
    assert len({loop(name)[0] for name in ("nothing", *WRITTEN)}) >= len(WRITTEN) - 2


def test_rules_let_some_prompts_and_some_tokens_through() -> None:
    clean, every, by_prompt, by_token = (loop(name)[0] for name in ("nothing", "all", "prompt rule", "token rule"))
    steered = [a != b for a, b in zip(by_prompt, clean, strict=True)]
    assert 0 < sum(steered) < len(PROMPTS)
    assert all(text == (b if on else a) for text, on, a, b in zip(by_prompt, steered, clean, every, strict=True))
    assert by_token not in (clean, every)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_the_other_backends_agree(backend: str) -> None:
    import subspace_probe as sp

    model = sp.load_model("organism:chat", backend=backend)
    for name in ("after:t_inst", "rows", "token rule", "prompt rule"):
        for use_cache in (True, False):
            assert generated(model, name, use_cache=use_cache) == loop(name)[0], (name, use_cache)
