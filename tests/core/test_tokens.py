"""Positions by meaning: absolute numbers, the same for a full pass and for a decoding step."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.tokens import TokenBatch


def batch(**changed: Any) -> "TokenBatch":
    """Two rows, `a b c d e` and `x y z`; the instruction is `b c` in the first and `y` in the second."""
    from subspace_probe.core.tokens import TokenBatch

    fields: dict[str, Any] = {
        "ids": torch.tensor([[1, 2, 3, 4, 5], [0, 0, 7, 8, 9]]),
        "mask": torch.tensor([[True] * 5, [False, False, True, True, True]]),
        "instruction": torch.tensor([[1, 2], [1, 1]]),
        "templated": torch.tensor([True, True]),
        "texts": ("a b c d e", "x y z"),
        "offsets": (((0, 1), (1, 3), (3, 5), (5, 7), (7, 9)), ((0, 1), (1, 3), (3, 5))),
        "index": torch.arange(2),
    }
    return TokenBatch(**fields | changed)


@pytest.mark.parametrize(
    "name",
    [
        "all",
        "prompt",
        "generated",
        "t_inst",
        "t_post_inst",
        "last",
        "instruction",
        "t_inst+2",
        "last-1",
        "at+0",
        "after:t_inst",
        "step+2",
    ],
)
def test_names_survive_a_round_trip(name: str) -> None:
    from subspace_probe.core.tokens import Where

    assert str(Where.parse(name)) == name


def test_names_are_read() -> None:
    from subspace_probe.core.tokens import GENERATED, LAST, T_INST, T_POST_INST, Where, at, span

    assert Where.parse("-1") == at(-1)
    assert Where.parse("7") == Where.parse("at+7") == at(7)
    assert Where.parse("T_INST") == Where.parse("t-inst") == T_INST
    assert Where.parse("t-post-inst-1") == T_POST_INST.offset(-1)
    assert Where.parse("last-2") == LAST.offset(-2) == LAST.offset(-1).offset(-1)
    assert Where.parse("span:the king: a") == span("the king: a")
    assert str(span("the king")) == "span:the king"
    assert LAST.single
    assert not GENERATED.single


def test_bad_names_say_what_is_known() -> None:
    from subspace_probe.core.errors import PositionError, UnknownName
    from subspace_probe.core.tokens import ALL, Where, span

    for name in ("t_ints", "--1", "last+", "", "last 1"):
        with pytest.raises(UnknownName, match=r"Unknown position .* Known: after, all, at, generated"):
            Where.parse(name)
    with pytest.raises(UnknownName, match="Did you mean 't_inst'"):
        Where.parse("t_ints")
    with pytest.raises(PositionError, match="'all' is many tokens and cannot be shifted by 1"):
        ALL.offset(1)
    with pytest.raises(PositionError, match="without its text"):
        span("")


def test_positions_count_real_tokens() -> None:
    from subspace_probe.core.tokens import LAST, T_INST, T_POST_INST, at

    shown = batch()
    assert shown.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert shown.lengths.tolist() == [5, 3]
    for where, expected in [
        (LAST, [4, 2]),
        (LAST.offset(-1), [3, 1]),
        (T_INST, [2, 1]),
        (T_INST.offset(1), [3, 2]),
        (T_POST_INST, [4, 2]),
        (T_POST_INST.offset(-2), [2, 0]),
        (at(0), [0, 0]),
        (at(2), [2, 2]),
        (at(-1), [4, 2]),
        (at(-3), [2, 0]),
    ]:
        assert shown.position(where).tolist() == expected, str(where)
        chosen = shown.select(where, shown.positions) & shown.mask
        assert shown.positions[chosen].tolist() == expected, str(where)


def test_a_position_a_prompt_does_not_have_names_the_prompt() -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.tokens import ALL, LAST, T_INST, T_POST_INST, at

    for where in (at(3), at(-4), LAST.offset(-3), LAST.offset(1)):
        with pytest.raises(
            PositionError, match=r"Prompt [01] has no position .* it is too short. It is: '(x y z|a b c)"
        ):
            batch().position(where)
    bare = batch(instruction=torch.tensor([[1, 2], [-1, -1]]), templated=torch.tensor([True, False]))
    for where in (T_INST, T_POST_INST, T_INST.offset(2)):
        with pytest.raises(PositionError, match=r"Prompt 1 .* no chat template.* Use 'last'"):
            bare.position(where)
    with pytest.raises(PositionError, match="'all' is not one token"):
        batch().position(ALL)


def test_many_tokens_at_once() -> None:
    from subspace_probe.core.errors import PositionError
    from subspace_probe.core.tokens import ALL, GENERATED, INSTRUCTION, PROMPT, span

    shown = batch()

    def real(where: Any) -> list[list[int]]:
        chosen = shown.select(where, shown.positions) & shown.mask
        return [shown.positions[row][chosen[row]].tolist() for row in range(2)]

    assert real(ALL) == real(PROMPT) == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert real(GENERATED) == [[], []]
    assert real(INSTRUCTION) == [[1, 2], [1]]
    with pytest.raises(PositionError, match="'c d' does not occur in prompt 1: 'x y z'"):
        real(span("c d"))
    shown = batch(texts=("a b c d e", "a b c"))
    assert real(span("b c")) == [[1, 2], [1, 2]]
    assert real(span("b")) == [[1], [1]]


def test_a_decoding_step_is_addressed_by_the_same_numbers() -> None:
    from subspace_probe.core.tokens import ALL, GENERATED, LAST, PROMPT, T_INST

    shown, step = batch(), torch.tensor([[5], [3]])  # the first generated token of each row
    assert shown.select(ALL, step).tolist() == shown.select(GENERATED, step).tolist() == [[True], [True]]
    for where in (PROMPT, LAST, T_INST):
        assert not shown.select(where, step).any(), str(where)
    assert shown.select(GENERATED, torch.tensor([[4], [3]])).tolist() == [[False], [True]]


def test_rows_lose_the_padding_that_none_of_them_needs() -> None:
    shown = batch()
    second = shown.rows([1])
    assert second.ids.tolist() == [[7, 8, 9]]
    assert second.mask.all()
    assert second.texts == ("x y z",)
    assert shown.rows([1, 0]).ids.tolist() == [[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]]
    assert shown.rows(slice(1, 2)).ids.tolist() == second.ids.tolist()


def test_repeating_stacks_the_whole_batch() -> None:
    twice = batch().repeat(2)
    assert twice.texts == ("a b c d e", "x y z") * 2
    assert twice.size == 4
    for row in range(4):
        assert torch.equal(twice.ids[row], batch().ids[row % 2])
        assert torch.equal(twice.instruction[row], batch().instruction[row % 2])
