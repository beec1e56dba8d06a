"""Interchange interventions: a base prompt is given part of a source prompt's state, and should answer accordingly.

What is below the site, and what is before the first exchanged token, is computed once (`Prefix`); every exchange after
that runs the layers above only. Several exchanges of the same prompts, such as the arms of a training, are stacked on
the batch axis. Geiger et al. 2021, arXiv:2106.02997; Geiger et al. 2024, arXiv:2303.02536.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast, components
from subspace_probe.core.edits import At
from subspace_probe.core.errors import DataError, PositionError
from subspace_probe.core.protocols import Prefix
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where
from subspace_probe.models.hooked import HookedModel

Change = Callable[[Float[Tensor, "arm n d"], Float[Tensor, "n d"]], Float[Tensor, "arm n d"]]
"""From the states of the bases, one copy an arm, and those of their sources, to what takes the bases' place."""


def answer_ids(model: HookedModel, contrast: Contrast) -> Int[Tensor, "n 2"]:
    """What each prompt should answer were its label 0, and were it 1: first tokens.

    Under its own label that is its `answer`; under the other the `answer` of its partner in the minimal pair, which
    differs in the label alone, and where it has none its `foil`.

    Raises:
        DataError: prompts without an answer, or with neither a partner nor a foil.
    """
    other: dict[tuple[int, int], str] = {}
    for prompt, label, pair in zip(contrast.prompts, contrast.labels, contrast.pairs, strict=True):
        if prompt.answer:
            other.setdefault((pair, 1 - label), prompt.answer)
    texts: list[list[str]] = []
    for row, (prompt, label, pair) in enumerate(zip(contrast.prompts, contrast.labels, contrast.pairs, strict=True)):
        swapped = other.get((pair, label)) or prompt.foil
        if not prompt.answer or not swapped:
            raise DataError(
                f"Prompt {row} of {contrast.name!r} says not what to answer under either label: {prompt.shown[:60]!r}. "
                "Interchange needs an 'answer', and a partner in its pair with the other label or a 'foil'."
            )
        texts.append([prompt.answer, swapped][:: -1 if label else 1])
    words = sorted({text for pair in texts for text in pair})
    ids = dict(zip(words, model.token_ids(words), strict=True))
    return torch.tensor([[ids[text] for text in pair] for pair in texts])


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """Some bases, run up to the site."""

    rows: Int[Tensor, " b"]
    prefix: Prefix


@final
class Interchange:
    """The prompts of a contrast, ready to be exchanged at one site.

    Args:
        model: whose states are exchanged.
        contrast: label 0 or 1 is the value of the variable; prompts carry answers.
        site: where.
        where: one token a prompt, in base and source.
        bases: rows of the contrast that are run as bases, in batches of `batch_size` in this order; also the sources.

    Raises:
        PositionError: more than one token a prompt.
        DataError: as `answer_ids`.
    """

    def __init__(
        self,
        model: HookedModel,
        contrast: Contrast,
        site: Site,
        where: Where,
        bases: Sequence[int],
        *,
        batch_size: int = 32,
        acts: Activations | None = None,
    ) -> None:
        if not where.single:
            raise PositionError(f"An interchange exchanges one token a prompt, not {str(where)!r}. Use last or t_inst.")
        self.model, self.where, self.site = model, where, site.resolve(model.spec.n_layers)
        self.acts = acts or model.capture(contrast, sites=[self.site], where=where)
        self.states = self.acts.at(self.site).to(model.backend.device)
        self.labels = torch.tensor(contrast.labels)
        self.units = torch.tensor(components(contrast.pairs, contrast.groups))
        self.answers = answer_ids(model, contrast)
        self.entry = self.site.lifted(model.spec.n_layers, model.standing_sites)
        self.bases: Int[Tensor, " bases"] = torch.tensor(bases)
        self.chunks = [
            self._chunk(contrast, bases[start : start + batch_size]) for start in range(0, len(bases), batch_size)
        ]

    def _chunk(self, contrast: Contrast, rows: Sequence[int]) -> Chunk:
        batch = self.model.tokens([contrast.prompts[row] for row in rows])
        first = batch.select(self.where, batch.positions) & batch.mask
        column = int(first.any(0).nonzero()[0])
        return Chunk(torch.tensor(rows), self.model.prefix(batch, self.entry.layer, column=column))

    def sources(self, *, same: float, seed: int) -> Int[Tensor, " bases"]:
        """A source for each base, drawn among the bases: of the other label, or with probability `same` of its own.

        Raises:
            DataError: a label that none of them has.
        """
        among = self.bases
        generator = torch.Generator().manual_seed(seed)
        own, other = (torch.rand(len(self.bases), generator=generator) for _ in range(2))
        value = self.labels[self.bases] ^ (own >= same).long()
        drawn = torch.zeros_like(value)
        for label in (0, 1):
            pool = among[self.labels[among] == label]
            if not len(pool):
                raise DataError(f"There are no rows of label {label} among {len(among)}. Both are needed as sources.")
            drawn = torch.where(value == label, pool[(other * len(pool)).long()], drawn)
        return drawn

    def split(self, rows: Int[Tensor, "*arm bases"]) -> tuple[Tensor, ...]:
        """What belongs to each base, chunk by chunk."""
        return rows.split([len(chunk.rows) for chunk in self.chunks], dim=-1)

    def wanted(self, labels: Int[Tensor, "arm n"], sources: Int[Tensor, " bases"]) -> Int[Tensor, "arm bases"]:
        """The token each base should answer with its source's value of the variable, one variable an arm."""
        return self.answers[self.bases, labels[:, sources]]

    def logits(
        self, chunk: Chunk, sources: Int[Tensor, " b"], change: Change, *, arms: int = 1, grad: bool = False
    ) -> Float[Tensor, "arm b d_vocab"]:
        """Last-token logits of the bases of a chunk after the exchange, one copy an arm."""
        given = self.states[sources.to(self.states.device)]

        def exchanged(x: Tensor, rows: Tensor) -> Tensor:
            return change(x.view(arms, len(given), -1), given.to(x)).reshape(x.shape)

        prefix = chunk.prefix if arms == 1 else chunk.prefix.repeat(arms)
        edits = {self.entry: At(self.where, exchanged)}
        found = self.model.run(prefix.batch, writes=edits, prefix=prefix, logits_to_keep=1, grad=grad).logits
        if found is None:
            raise RuntimeError("a pass that was not stopped gave no logits")
        return found[:, -1].float().view(arms, len(sources), -1)

    def score(
        self, change: Change, sources: Int[Tensor, " bases"], labels: Int[Tensor, "arm n"]
    ) -> tuple[Float[Tensor, "arm bases"], Bool[Tensor, "arm bases"]]:
        """Cross-entropy with the wanted token, and whether it is the most likely of the whole vocabulary."""
        losses: list[Tensor] = []
        hits: list[Tensor] = []
        wanted = self.split(self.wanted(labels, sources))
        for chunk, drawn, token in zip(self.chunks, self.split(sources), wanted, strict=True):
            logits = self.logits(chunk, drawn, change, arms=len(labels)).cpu()
            losses.append(cross_entropy(logits, token))
            hits.append(logits.argmax(-1) == token)
        return torch.cat(losses, dim=1), torch.cat(hits, dim=1)


def cross_entropy(logits: Float[Tensor, "arm n d_vocab"], tokens: Int[Tensor, "arm n"]) -> Float[Tensor, "arm n"]:
    """Negative log-probability of a token, in nats, over the full vocabulary."""
    return logits.logsumexp(-1) - logits.gather(-1, tokens[..., None].to(logits.device))[..., 0]


def unchanged(base: Float[Tensor, "arm n d"], source: Float[Tensor, "n d"]) -> Float[Tensor, "arm n d"]:
    """Nothing is exchanged: the floor of every accuracy."""
    return base


def whole(base: Float[Tensor, "arm n d"], source: Float[Tensor, "n d"]) -> Float[Tensor, "arm n d"]:
    """The whole state is exchanged."""
    return source.expand_as(base)


def within(bases: Float[Tensor, "arm k d"], mask: Float[Tensor, "arm k"] | None = None) -> Change:
    """The components inside a subspace are exchanged, one subspace an arm; computed in its dtype, added in the model's.

    Args:
        bases: orthonormal rows.
        mask: how far each coordinate is exchanged, 0 to 1; all wholly by default.
    """

    def change(base: Tensor, source: Tensor) -> Tensor:
        frame = bases.to(base.device)
        coords = (source.to(frame) - base.to(frame)) @ frame.mT
        coords = coords if mask is None else coords * mask[:, None].to(coords)
        return base + (coords @ frame).to(base)

    return change
