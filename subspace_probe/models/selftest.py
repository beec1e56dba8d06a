"""Are the positions where they should be? Run on a model before anything read at T_INST is believed.

A position found by counting the tokens of a template's suffix is silently off where a template merges with the text
before it. These checks do not use how the positions were found: they look at the text that was rendered, at the states
of the tokens, and at causality.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.errors import PositionError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import T_INST, TokenBatch
from subspace_probe.models.hooked import HookedModel, PromptsLike, as_prompts


def check_positions(model: HookedModel, prompts: PromptsLike) -> None:
    """Check where T_INST lies. A few prompts of different length and last token are enough.

    1. The token at T_INST ends the instruction.
    2. What follows is the template and the same behind every whole instruction: equal text, and equal states at layer 0
       (equal ids, where positions are learned and states differ by place).
    3. States at T_INST do not change when what follows is removed.

    Raises:
        PositionError: one of them fails, or a prompt has no instruction.
    """
    shown, batch = as_prompts(prompts), model.tokens(prompts)
    ends = batch.position(T_INST)
    for row, prompt in enumerate(shown):
        _require_end(batch, row, int(ends[row]), prompt)
    # behind a part of a message comes the rest of the message, which is the prompt's own
    whole = [row for row, prompt in enumerate(shown) if prompt.instruction is None]
    if len(whole) > 1:
        first = Site(0, "resid_pre")
        states = model.run(batch, reads=[first], stop_after=first).reads[first].cpu()
        _require_same_template(batch, whole, ends, states, by_id=model.spec.learned_positions)
    last = Site(model.spec.n_layers - 1)
    full = model.run(batch, reads=[last], stop_after=last).reads[last].cpu()
    cut = model.run(_until(batch, ends), reads=[last], stop_after=last).reads[last].cpu()
    at_end = full[torch.arange(batch.size), batch.ids.shape[1] - batch.lengths + ends]
    if not _close(cut[:, -1], at_end):
        raise PositionError(
            "States at T_INST change when what follows the instruction is removed, so they depend on tokens behind it. "
            "The model is not causal, or an edit or the padding moves information backwards."
        )


def _require_end(batch: TokenBatch, row: int, end: int, prompt: Prompt) -> None:
    text, (start, stop) = batch.texts[row], batch.offsets[row][end]
    part = (prompt.instruction or prompt.shown).strip()
    if not any(text.endswith(part, 0, upto) for upto in range(start + 1, stop + 1)):
        raise PositionError(
            f"T_INST of prompt {row} is the token {text[start:stop]!r}, which does not end the instruction {part!r}. "
            f"The prompt is rendered as {text!r}."
        )


def _require_same_template(
    batch: TokenBatch,
    rows: list[int],
    ends: Int[Tensor, " batch"],
    states: Float[Tensor, "batch pos d_model"],
    *,
    by_id: bool,
) -> None:
    tails = {row: batch.texts[row][batch.offsets[row][int(ends[row])][1] :] for row in rows}
    guide = max(rows, key=lambda row: len(tails[row]))
    for row in rows:
        tail, token = tails[row], batch.texts[row][slice(*batch.offsets[row][int(ends[row])])]
        # the template's first characters may be in one token with the instruction's last
        merged = tails[guide].removesuffix(tail)
        if not tails[guide].endswith(tail) or not token.endswith(merged):
            raise PositionError(
                f"Behind T_INST, prompt {guide} goes on with {tails[guide]!r} and prompt {row} with {tail!r}. "
                "Both should be the template alone, so one of the positions is wrong."
            )
        for back in range(1, min(len(batch.offsets[r]) - int(ends[r]) for r in (row, guide))):
            spans = [tuple(len(batch.texts[r]) - c for c in batch.offsets[r][-back]) for r in (row, guide)]
            same_id = bool(batch.ids[row, -back] == batch.ids[guide, -back])
            if spans[0] == spans[1] and not (same_id and (by_id or _close(states[row, -back], states[guide, -back]))):
                raise PositionError(
                    f"Token {back} from the end, {batch.texts[row][slice(*batch.offsets[row][-back])]!r}, has another "
                    f"{'state at layer 0' if same_id else 'id'} in prompt {row} than in prompt {guide}. It should "
                    "be the template's, and the same."
                )


def _until(batch: TokenBatch, ends: Int[Tensor, " batch"]) -> TokenBatch:
    """Each row up to and with its token at `ends`, left padded."""
    width = int(ends.max()) + 1
    positions = torch.arange(width) - (width - 1) + ends[:, None]
    mask = positions >= 0
    columns = (batch.ids.shape[1] - batch.lengths[:, None] + positions).clamp(min=0)
    offsets = tuple(row[: int(end) + 1] for row, end in zip(batch.offsets, ends, strict=True))
    return replace(batch, ids=batch.ids.gather(1, columns), mask=mask, offsets=offsets)


def _close(found: Float[Tensor, "*n d"], wanted: Float[Tensor, "*n d"]) -> bool:
    # another padding changes the order of sums, and half precision rounds them
    tolerance = (1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2) * float(wanted.abs().max())
    return bool((found.float() - wanted.float()).abs().max() <= tolerance)
