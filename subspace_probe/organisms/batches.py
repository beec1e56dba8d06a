"""Examples as tensors: ids, targets, positions, variable values and the answers that interchanges imply."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from subspace_probe.organisms import skills
from subspace_probe.organisms.grammar import PAD, SKILLS, VARIABLES, Example, Skill, answer_word, tokens
from subspace_probe.organisms.tokenizer import vocabulary
from subspace_probe.organisms.words import Split

IGNORE: Final = -100
N_LENGTHS: Final = 4


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded examples, right-padded.

    ``values[i, v]`` is the value of variable ``v`` (-1 where undefined); ``implied[i, v, value]`` is the first answer
    token after setting it.
    """

    ids: Tensor
    targets: Tensor
    lengths: Tensor
    t_inst: Tensor
    t_post: Tensor
    skill: Tensor
    framing: Tensor
    values: Tensor
    first: Tensor
    implied: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> "Batch":
        """The chosen rows, cut to the longest of them."""
        longest = int(self.lengths[index].max())
        parts = {name: value[index] for name, value in vars(self).items()}
        parts["ids"], parts["targets"] = parts["ids"][:, :longest], parts["targets"][:, :longest]
        return Batch(**parts)


def encode(examples: Sequence[Example], *, aligned: bool) -> Batch:
    """Encode examples for a model that refuses (``aligned``) or does not."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    rows = [tokens(example, aligned=aligned) for example in examples]
    width = max(len(row.prompt) + len(row.answer) for row in rows)
    inputs = torch.full((len(rows), width), ids[PAD])
    targets = torch.full((len(rows), width), IGNORE)
    for i, row in enumerate(rows):
        words = [ids[word] for word in (*row.prompt, *row.answer)]
        inputs[i, : len(words)] = torch.tensor(words)
        start = len(row.prompt)
        targets[i, start - 1 : len(words) - 1] = torch.tensor(words[start:])
    implied = [
        [[ids[_implied(e, aligned, v, value)] for value in (0, 1)] for v in range(len(VARIABLES))] for e in examples
    ]
    values = [[-1 if (x := e.value(v)) is None else x for v in VARIABLES] for e in examples]
    t_post = torch.tensor([row.t_post_inst for row in rows])
    return Batch(
        ids=inputs,
        targets=targets,
        lengths=torch.tensor([len(row.prompt) + len(row.answer) for row in rows]),
        t_inst=torch.tensor([row.t_inst for row in rows]),
        t_post=t_post,
        skill=torch.tensor([SKILLS.index(e.skill) for e in examples]),
        framing=torch.tensor([e.framing for e in examples]),
        values=torch.tensor(values),
        first=targets[torch.arange(len(rows)), t_post],
        implied=torch.tensor(implied),
    )


def _implied(example: Example, aligned: bool, variable: int, value: int) -> str:
    if example.skill == "text":
        return example.text.split()[0]
    return answer_word(example, aligned=aligned, variable=VARIABLES[variable], value=value)


@final
class Mixture:
    """A fixed stock of encoded examples, drawn in batches of a fixed composition and of similar lengths.

    Within each skill the stock is sorted by length and cut in quarters; one batch draws one quarter of every skill,
    which saves a third of the padding without separating skills.
    """

    def __init__(
        self, split: Split, counts: Mapping[Skill, int], *, stock: int, aligned: bool, seed: int, bare: bool = False
    ) -> None:
        rng = random.Random(seed)
        examples: list[Example] = []
        self._ranges: list[tuple[int, int, int]] = []
        total = sum(counts.values())
        for skill, count in counts.items():
            n = max(4 * N_LENGTHS, stock * count // total)
            drawn = [skills.draw(rng, split, skill, bare=bare) for _ in range(n)]
            drawn.sort(key=lambda e: sum(len(content.split()) + 2 for _, content in e.messages) + len(e.text.split()))
            self._ranges.append((len(examples), n, count))
            examples += drawn
        self._batch = encode(examples, aligned=aligned)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Batch:
        """The next batch."""
        quarter = int(torch.randint(N_LENGTHS, (), generator=self._generator))
        index = [
            start + torch.randint(n * quarter // N_LENGTHS, n * (quarter + 1) // N_LENGTHS, (count,),
                                  generator=self._generator)
            for start, n, count in self._ranges
        ]  # fmt: skip
        return self._batch.take(torch.cat(index))
