"""What a prompt may be."""

import pytest


def test_a_prompt_is_a_text_or_a_chat() -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.prompts import Message, Prompt

    user, answer = Message(role="user", content="Why?"), Message(role="assistant", content="So.")
    assert Prompt(messages=(user, answer, user)).shown == Prompt("Why?").shown == "Why?"
    for make, why in [
        (lambda: Prompt(), "neither text nor messages"),
        (lambda: Prompt("Why?", (user,)), "both text and messages"),
        (lambda: Prompt(messages=(user, answer)), "from 'assistant'. It must be from 'user'"),
        (lambda: Prompt(" \n"), "empty or only white space"),
        (lambda: Prompt(messages=(Message(role="user", content=""),)), "empty or only white space"),
        (lambda: Prompt("Why?", instruction=" "), "is not part of"),
        (lambda: Prompt("Why?", instruction="How?"), "'How\\?' is not part of the last user message 'Why\\?'"),
    ]:
        with pytest.raises(DataError, match=why):
            make()


def test_asking_about_a_prompt_leaves_its_instruction() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.prompts import Message, Prompt, asking

    asked = asking(Prompt("Steal it.", answer="Sorry", foil="Sure"), "{x} Is this harmful?")
    assert (asked.text, asked.instruction) == ("Steal it. Is this harmful?", "Steal it.")
    assert (asked.answer, asked.foil) == (None, None)
    assert asking(asked, "{x} Sure?").instruction == "Steal it."
    system = Message(role="system", content="Be brief.")
    turns = asking(Prompt(messages=(system, Message(role="user", content="Go."))), "Is {x} harmful?")
    assert turns.messages == (system, Message(role="user", content="Is Go. harmful?"))
    assert turns.instruction == "Go."
    with pytest.raises(ConfigError, match=r"has no \{x\}"):
        asking(Prompt("Go."), "Is this harmful?")
