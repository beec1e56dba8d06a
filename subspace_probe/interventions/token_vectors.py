"""Tokens as a search sees them: their states where the first block begins, which may be used, which survive a text.

The states are read from the model itself, so that learned positions, embedding scales and norms are in them.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.tokens import TokenBatch, at
from subspace_probe.interventions.objectives import EMBEDDED
from subspace_probe.models.hooked import HookedModel


def token_vectors(
    model: HookedModel, ids: Int[Tensor, " v"], *, position: int, batch_tokens: int = 65536
) -> Float[Tensor, "v d_model"]:
    """The state of every token at one position where the first block begins: its effective embedding.

    Args:
        position: absolute; makes a difference only where positions are learned.
        batch_tokens: how many tokens one pass may have.

    Returns:
        Shape [v, d_model], on the CPU, in the model's dtype.
    """
    length = position + 1 if model.spec.learned_positions else 1
    size = max(1, batch_tokens // length)
    found: list[Tensor] = []
    for part in ids.split(size):
        run = model.run(
            _filled(part, length), reads=[EMBEDDED], stop_after=EMBEDDED, where=at(length - 1)
        )  # what stands before does not matter to an embedding
        found.append(run.reads[EMBEDDED].cpu())
    return torch.cat(found)


def _filled(ids: Tensor, length: int) -> TokenBatch:
    """One row a token: the token, so many times."""
    n = len(ids)
    return TokenBatch(
        ids=ids[:, None].expand(n, length).contiguous(),
        mask=torch.ones(n, length, dtype=torch.bool),
        instruction=torch.full((n, 2), -1),
        templated=torch.zeros(n, dtype=torch.bool),
        texts=("",) * n,
        offsets=((),) * n,
        index=torch.arange(n),
    )


def neighbour_distance(vectors: Float[Tensor, "v d"], *, most: int = 2048, seed: int = 0) -> float:
    """The median distance of a token to its nearest neighbour among the others: what "one token away" means.

    Args:
        most: tokens whose neighbours are looked for, drawn at random where there are more.

    Raises:
        ConfigError: fewer than two tokens.
    """
    n = len(vectors)
    if n < 2:
        raise ConfigError(f"Distances between tokens were asked for, but {n} tokens may be used. Allow at least two.")
    work = vectors.float()
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most]
    nearest: list[Tensor] = []
    for part in chosen.split(256):
        distances = torch.cdist(work[part], work, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(part)), part] = float("inf")
        nearest.append(distances.min(1).values)
    return float(torch.cat(nearest).median())


def usable_ids(
    model: HookedModel, *, allowed: Collection[int] | None = None, banned: Collection[int] = ()
) -> Int[Tensor, " v"]:
    """The tokens a search may use, ascending: those with a text, without special ones and those that are banned.

    Args:
        allowed: only these; special tokens among them are left out all the same.
        banned: none of these.

    Raises:
        ConfigError: tokens that the model does not have, or nothing left.
    """
    tokenizer: Any = model.tokenizer
    d_vocab = model.spec.d_vocab
    strange = sorted(i for i in {*(allowed or ()), *banned} if not 0 <= i < d_vocab)
    if strange:
        raise ConfigError(f"Tokens {strange[:5]} were named, but the model has tokens 0 to {d_vocab - 1}.")
    known = {int(i) for i in tokenizer.get_vocab().values()} & set(range(d_vocab))
    special = {int(i) for i in tokenizer.all_special_ids}
    special |= {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    left = (known if allowed is None else known & set(allowed)) - special - set(banned)
    if not left:
        raise ConfigError("No token is left to search over: all are banned or special. Ban fewer, or allow more.")
    return torch.tensor(sorted(left))


def survive(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[bool]:
    """Whether each complete id sequence, written as a text and read again, gives the same ids."""
    if not rows:
        return []
    texts = tokenizer.batch_decode(
        [list(row) for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    again = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(a) == list(b) for a, b in zip(rows, again, strict=True)]


def require_survivors(tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:
    """Check that prompts survive as they are; where they do not, no change of them could be checked.

    Raises:
        ConfigError: the first that does not.
    """
    for row, good in enumerate(survive(tokenizer, rows)):
        if not good:
            text = tokenizer.decode(list(rows[row]))
            raise ConfigError(
                f"Prompt {row} does not survive being written and read again as it is: {text!r}. So no change of it "
                "can be checked either. Pass round_trip=False if ids are all that matters."
            )


def parse_ids(text: str) -> set[int]:
    """Token ids as they are written in settings: `16-55,60`.

    Raises:
        ConfigError: a text that is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{text!r} is not a list of token ids. Write for instance 16-55,60.")
        found |= set(range(int(first), int(last or first) + 1))
    return found
