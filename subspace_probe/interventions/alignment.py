"""Which token of a prompt corresponds to which token of its partner: stated, never guessed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, PositionError
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.tokens import TokenBatch, Where, at
from subspace_probe.models.hooked import HookedModel, PromptsLike, as_prompts

Mode = Literal["denoise", "noise"]


@final
@dataclass(frozen=True, eq=False)
class Aligned:
    """Pairs of prompts and the tokens to be exchanged between them.

    Attributes:
        prompts: the clean prompts, whose answers a metric asks for in every run.
        base: the prompts that are run.
        source: their partners, whose states are put in.
        positions: a name for each token.
        base_at: its absolute position in every base, shape [position, n].
        source_at: its absolute position in every source, shape [position, n].
        texts: the text of each token where all clean prompts agree on it, else "".
        groups: near-duplicates and sources of the clean prompts; intervals go by group.
        data: the name of the data.
        key: of the prompts of both sides, clean ones first.
    """

    prompts: tuple[Prompt, ...]
    base: TokenBatch
    source: TokenBatch
    positions: tuple[str, ...]
    base_at: Int[Tensor, "position n"]
    source_at: Int[Tensor, "position n"]
    texts: tuple[str, ...]
    groups: Int[Tensor, " n"]
    data: str
    key: str

    def parts(self, batch_tokens: int) -> Iterator[list[int]]:
        """Prompts whose bases are of one length, and whose sources are, so that nothing is padded."""
        lengths = torch.stack([self.base.lengths, self.source.lengths], 1)
        for pair in lengths.unique(dim=0):
            rows: list[int] = (lengths == pair).all(1).nonzero().flatten().tolist()
            size = max(1, batch_tokens // int(pair.max()))
            yield from (rows[start : start + size] for start in range(0, len(rows), size))


def align(
    model: HookedModel,
    clean: PromptsLike,
    corrupt: PromptsLike,
    positions: Sequence[Where | int | str] | None,
    mode: Mode,
) -> Aligned:
    """Tokenise pairs and find the tokens asked for.

    Args:
        positions: one token each; None for every absolute position, where all prompts have equally many tokens.
        mode: `denoise` runs the corrupt prompts, `noise` the clean ones.

    Raises:
        DataError: no prompts, or not as many corrupt ones as clean ones.
        PositionError: lengths differ and no positions are given, or a prompt does not have one.
        ConfigError: an unknown mode, an encoder, or no positions.
    """
    if mode not in ("denoise", "noise"):
        raise ConfigError(f"mode={mode!r} was given. Use 'denoise' (run the corrupt prompts) or 'noise' (the clean).")
    if model.spec.encoder:
        raise ConfigError(f"{model.spec.family} is an encoder and has no next-token logits. Use a decoder model.")
    pairs = as_prompts(clean), as_prompts(corrupt)
    if not pairs[0] or len(pairs[0]) != len(pairs[1]):
        raise DataError(
            f"{len(pairs[0])} clean and {len(pairs[1])} corrupt prompts were given. Give each clean prompt one partner."
        )
    batches = [model.tokens(prompts) for prompts in pairs]
    asked = _asked(batches, positions)
    found = [torch.stack([batch.position(where) for where in asked]) for batch in batches]
    base, source = (1, 0) if mode == "denoise" else (0, 1)
    names = tuple(str(where.shift) if where.anchor == "at" else str(where) for where in asked)
    return Aligned(
        prompts=pairs[0],
        base=batches[base],
        source=batches[source],
        positions=names,
        base_at=found[base],
        source_at=found[source],
        texts=tuple(_shared_text(batches[0], column) for column in found[0]),
        groups=torch.as_tensor(clean.groups if isinstance(clean, Contrast) else range(len(pairs[0]))),
        data=clean.name if isinstance(clean, Contrast) else "prompts",
        key=content_key(pairs),
    )


def _asked(batches: Sequence[TokenBatch], positions: Sequence[Where | int | str] | None) -> list[Where]:
    lengths = sorted({int(length) for batch in batches for length in batch.lengths})
    if positions is None:
        if len(lengths) > 1:
            raise PositionError(
                f"The prompts have {lengths[0]} to {lengths[-1]} tokens, so equal positions need not mean equal words. "
                "Say which tokens correspond: positions=[T_INST, LAST, at(-3)]."
            )
        return [at(position) for position in range(lengths[0])]
    asked = [_where(position) for position in positions]
    if not asked:
        raise ConfigError("No positions were given. Name at least one, such as LAST, or leave positions out.")
    if several := [str(where) for where in asked if not where.single]:
        raise PositionError(f"{', '.join(several)} is not one token of each prompt. Give LAST, T_INST, at(3), ...")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"A position was given twice: {', '.join(map(str, asked))}. Name each once.")
    return asked


def _where(position: Where | int | str) -> Where:
    if isinstance(position, int):
        return at(position)
    return Where.parse(position) if isinstance(position, str) else position


def _shared_text(batch: TokenBatch, positions: Int[Tensor, " n"]) -> str:
    """The text of one token of each prompt, where it is the same in all."""
    found = {batch.texts[row][slice(*batch.offsets[row][position])] for row, position in enumerate(positions.tolist())}
    return found.pop().strip() if len(found) == 1 else ""
