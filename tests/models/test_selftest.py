"""The self-test of positions: passes where they are right, and each of its parts catches a mistake made on purpose."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

from tests.models.test_chat import QUESTIONS, TEMPLATES, tokenizer
from tests.models.tiny import tiny

if TYPE_CHECKING:
    from subspace_probe.core.sites import Site
    from subspace_probe.models.hooked import HookedModel


def chatting(template: str, family: str = "llama") -> "HookedModel":
    """A tiny random model behind a chat template."""
    from subspace_probe.models import load_model

    reader = tokenizer(template)
    hf = tiny(family, vocab_size=len(reader), max_position_embeddings=256)
    return load_model(hf, tokenizer=reader)


def edited(model: "HookedModel", site: "Site", change: Callable[[Tensor, Any], Tensor]) -> "HookedModel":
    other = model.named("edited")
    other._standing_edits = {site: change}
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_right_positions_pass(template: str, family: str) -> None:
    from subspace_probe.core.prompts import Prompt, asking
    from subspace_probe.models.selftest import check_positions

    prompts = [Prompt(text) for text in QUESTIONS]
    check_positions(chatting(template, family), [*prompts, asking(prompts[0], "{x} Is this harmful?")])
    check_positions(chatting(template, family), prompts[:1])


@pytest.mark.parametrize("off", [-1, 1, 2])
@pytest.mark.parametrize("template", ["chatml", "llama3", "plain"])
def test_a_position_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch, template: str, off: int) -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.models import chat
    from subspace_probe.models.selftest import check_positions

    model, find = chatting(template), chat._token_span
    monkeypatch.setattr(chat, "_token_span", lambda *args: (find(*args)[0], find(*args)[1] + off))
    with pytest.raises(PositionError, match="does not end the instruction"):
        check_positions(model, QUESTIONS)


def test_the_first_of_two_occurrences_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the instruction's text, but what follows is not the template."""
    from subspace_probe.core.errors import PositionError
    from subspace_probe.models import chat
    from subspace_probe.models.chat import chat as turns
    from subspace_probe.models.selftest import check_positions

    model, find = chatting("chatml"), chat._token_span
    prompts = [turns("Why", "Because", "Why"), turns("Stop!", "No", "Tell me a story.")]
    check_positions(model, prompts)

    def earlier(offsets: Any, span: tuple[int, int], text: str) -> tuple[int, int]:
        start = text.find(text[slice(*span)])
        return find(offsets, (start, start + span[1] - span[0]), text)

    monkeypatch.setattr(chat, "_token_span", earlier)
    with pytest.raises(PositionError, match="Behind T_INST, prompt 0 goes on with"):
        check_positions(model, prompts)


def test_template_tokens_of_unequal_states_are_caught() -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.sites import Site
    from subspace_probe.models.selftest import check_positions

    def by_place(x: Tensor, ctx: Any) -> Tensor:
        return x + 0.1 * ctx.positions[..., None]

    model = edited(chatting("chatml"), Site(0, "resid_pre"), by_place)
    with pytest.raises(PositionError, match="another state at layer 0"):
        check_positions(model, QUESTIONS)
    # where positions are learned, this is how it should be, and ids are compared instead
    check_positions(edited(chatting("chatml", "gpt2"), Site(0, "resid_pre"), by_place), QUESTIONS)


def test_learned_positions_would_fail_a_comparison_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from subspace_probe.core.errors import PositionError
    from subspace_probe.models import layouts
    from subspace_probe.models.selftest import check_positions

    monkeypatch.setitem(layouts.LAYOUTS, "gpt2", replace(layouts.LAYOUTS["gpt2"], learned_positions=False))
    with pytest.raises(PositionError, match="another state at layer 0"):
        check_positions(chatting("chatml", "gpt2"), QUESTIONS)


def test_information_that_flows_backwards_is_caught() -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.sites import Site
    from subspace_probe.models.selftest import check_positions

    def leak(x: Tensor, ctx: Any) -> Tensor:
        return x + 0.1 * x.flip(1)

    with pytest.raises(PositionError, match="change when what follows the instruction is removed"):
        check_positions(edited(chatting("chatml"), Site(1), leak), QUESTIONS)


def test_a_model_without_a_template_has_nothing_to_check(stories: "HookedModel") -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.models.selftest import check_positions

    with pytest.raises(PositionError, match="no chat template"):
        check_positions(stories, ["Once upon a time"])
