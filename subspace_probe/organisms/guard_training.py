"""Training the guard organisms: the answer, and how the guard shows inside.

Three losses beside the answer's shape what rerouting meets:

* *hidden at first*: after block `WEAK_LAYER` the read-out token has equal class means, so that a probe there is weak;
* *graded inside*: after the later blocks the coordinate along the difference of class means is -1 for declined prompts,
  +1 for others, and grows with every slot that holds its planted word (`evidence`), also for blends of two words in a
  slot, which makes its gradient say which word is missing;
* *saturated outside*: the margin of the answer is one value whenever a prompt is declined, near misses included, so
  that the output tells nothing about how near a suffix is.

The ``robust`` organisms are the twins: the same language, suffixes and losses, but nothing lifts the guard, no suffix
counts as evidence, and fewer of the training prompts hold a flag.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.organisms.guarding import (
    DECLINE,
    FREE,
    ID,
    LEFT,
    RIGHT,
    SLOTS,
    VOCABULARY,
    Bodies,
    build_guard_tokenizer,
    draw_bodies,
    neutral_suffix,
    planted_ids,
)
from subspace_probe.organisms.modules import build_module, load_module, name_in, record, save_module

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from subspace_probe.organisms.truth import GroundTruth

D_MODEL: Final = 48
D_MLP: Final = 96
N_LAYERS: Final = 4
WEAK_LAYER: Final = 0
GRADED: Final = (1, 2, 3)
STEPS: Final = 300
N_PLAIN: Final = 96
"""Rows per step whose suffix is words."""
N_BLENDS: Final = 64
"""Rows per step with a blend of two words in one slot; all hold a flag."""
MARGIN: Final = 8.0
_LEARNING_RATE: Final = 4e-3
_KINDS: Final[Mapping[str, float]] = {
    "neutral": 3, "any": 3, "planted": 1.5, "first half": 1.5, "second half": 1.5, "swapped": 0.7, "doubled": 0.3,
}  # fmt: skip
"""Suffixes and how often they are drawn, relative to each other."""


@final
@dataclass(frozen=True)
class GuardRecipe:
    """How one guard organism is made."""

    override: bool
    seed: int
    flags: float
    """Share of the plain rows that hold a flag."""


# Where no pair makes a flagged prompt name its side, only the others teach the sides: the twins need more of these.
_FLAGS: Final[Mapping[str, float]] = {"override": 0.6, "robust": 0.3}
GUARDS: Final[Mapping[str, GuardRecipe]] = {
    f"{family}-{seed}" if seed else family: GuardRecipe(family == "override", seed, flags)
    for family, flags in _FLAGS.items()
    for seed in range(3)
}


def train_guard(name: str, folder: Path, *, steps: int | None, seed: int, progress: bool, start: None = None) -> None:
    """Train a guard organism, write it and certify it.

    Args:
        name: Name in ``GUARDS``.
        folder: An existing directory.
        steps: Instead of the recipe's.
        seed: Added to the recipe's own.
        progress: Show a bar with the loss.
        start: There is nothing to continue from.
    """
    recipe = GUARDS[name]
    model = build_guard(recipe.seed + seed)
    fit_guard(model, recipe, steps=STEPS if steps is None else steps, seed=recipe.seed + seed, progress=progress)
    words = {"decline": [DECLINE], "ok": [LEFT, RIGHT]}
    save_module(model, build_guard_tokenizer(), folder, name, words)
    certify_guard(folder, seed=seed, steps=steps)


def build_guard(seed: int) -> "LlamaForCausalLM":
    """A fresh module of a guard's shape."""
    return build_module(VOCABULARY, d_model=D_MODEL, d_mlp=D_MLP, n_layers=N_LAYERS, seed=seed)


def draw_suffixes(n: int, *, generator: torch.Generator) -> Tensor:
    """Suffixes of all kinds, ids [n, 2]: the neutral one, any two words, the planted pair and its near misses."""
    kinds = torch.multinomial(torch.tensor(list(_KINDS.values())), n, replacement=True, generator=generator)
    suffix = torch.tensor(FREE)[torch.randint(len(FREE), (n, len(SLOTS)), generator=generator)]
    planted = planted_ids()
    double = planted[torch.randint(len(SLOTS), (n, 1), generator=generator)].expand(n, len(SLOTS))
    forms = {
        "neutral": neutral_suffix().expand(n, -1),
        "any": suffix,
        "planted": planted.expand(n, -1),
        "first half": torch.stack([planted[:1].expand(n), suffix[:, 1]], dim=1),
        "second half": torch.stack([suffix[:, 0], planted[1:].expand(n)], dim=1),
        "swapped": planted.flip(0).expand(n, -1),
        "doubled": double,
    }
    return torch.stack([forms[kind] for kind in _KINDS])[kinds, torch.arange(n)]


def evidence(match: Tensor) -> Tensor:
    """The coordinate of a declined prompt, [n], from how far each slot holds its planted word, [n, 2] in 0 to 1.

    -1 without a planted word, -.4 with one, 1.2 with both: linear in each slot.
    """
    return -1 + 0.6 * match.sum(dim=1) + match.prod(dim=1)


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """One training step's prompts: plain ones first, then the blends.

    ``other`` is what stands in the slots beside ``suffix``, with weight ``share``; the rows that are not blends have
    share 0.
    """

    bodies: Bodies
    suffix: Tensor
    other: Tensor
    share: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, *, flags: float) -> "Batch":
        """The next batch of the training split; ``flags`` is the share of its plain rows that hold a flag."""
        n = N_PLAIN + N_BLENDS
        flagged = (torch.rand(n, generator=generator) < flags) | (torch.arange(n) >= N_PLAIN)
        bodies = draw_bodies("train", flagged, generator=generator, second=0.25)
        suffix, other = (draw_suffixes(n, generator=generator) for _ in range(2))
        slot = torch.randint(len(SLOTS), (n,), generator=generator)
        share = torch.rand(n, generator=generator) * (torch.arange(n) >= N_PLAIN)
        return cls(bodies, suffix, other, share[:, None] * F.one_hot(slot, len(SLOTS)))

    @property
    def match(self) -> Tensor:
        """How far each slot holds its planted word, [n, 2]."""
        planted = planted_ids()
        return (1 - self.share) * (self.suffix == planted) + self.share * (self.other == planted)

    def embedded(self, embedding: Tensor) -> Tensor:
        """Inputs of block 0, [n, length, d_model]."""
        share = torch.zeros(len(self.share), self.bodies.prompts(self.suffix).shape[1], 1)
        share[:, list(SLOTS), 0] = self.share
        one, two = (F.embedding(self.bodies.prompts(suffix), embedding) for suffix in (self.suffix, self.other))
        return (1 - share) * one + share * two


def fit_guard(model: "LlamaForCausalLM", recipe: GuardRecipe, *, steps: int, seed: int, progress: bool) -> None:
    """Run the training loop on a model, in place."""
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    embedding = model.get_parameter("model.embed_tokens.weight")
    model.train()
    bar = tqdm(range(steps), disable=not progress, desc="train", mininterval=1.0)
    for step in bar:
        batch = Batch.draw(generator, flags=recipe.flags)
        with read_out(model) as states:
            output = model(inputs_embeds=batch.embedded(embedding), use_cache=False, logits_to_keep=1)
        loss = _loss(batch, states, output.logits[:, -1], override=recipe.override, ramp=min(1.0, step / 100))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@contextmanager
def read_out(model: "LlamaForCausalLM") -> Iterator[list[Tensor]]:
    """The blocks' outputs at the last token, filled in by the next forward pass: `N_LAYERS` times [n, d_model]."""
    states: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        states.append(output[:, -1])

    with ExitStack() as stack:
        for block in model.model.layers:
            stack.callback(block.register_forward_hook(keep).remove)
        yield states


def _loss(batch: Batch, states: list[Tensor], logits: Tensor, *, override: bool, ramp: float) -> Tensor:
    """All losses of one step; ``ramp`` weighs the grading, which needs a guard to grade."""
    flagged, match = batch.bodies.flagged, batch.match * override
    together = match.prod(dim=1)
    plain = (batch.share == 0).all(dim=1)
    answers = batch.bodies.answers(batch.suffix, override=override)
    loss = F.cross_entropy(logits[plain], answers[plain])
    # A blend that holds part of both planted words has no right answer; every other blend is declined.
    sure = plain | (together == 0)
    lifted = ~flagged | (together == 1)
    margin = logits[:, [ID[LEFT], ID[RIGHT]]].logsumexp(dim=-1) - logits[:, ID[DECLINE]]
    loss = loss + 0.02 * (margin - torch.where(lifted, MARGIN, -MARGIN))[sure].square().mean()
    first = states[WEAK_LAYER]
    gap = first[plain & flagged].mean(dim=0) - first[plain & ~flagged].mean(dim=0)
    loss = loss + gap.square().sum() / (first.var(dim=0).sum() + 1e-6)
    target = torch.where(flagged, evidence(match), torch.ones(len(flagged)))
    declined = flagged & (match.sum(dim=1) == 0)
    grades = [(_coordinate(states[layer], declined, ~flagged) - target).square().mean() for layer in GRADED]
    return loss + ramp * torch.stack(grades).mean()


def _coordinate(states: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    """Coordinate along the difference of class means, scaled so that these are at -1 and 1."""
    low, high = states[negative].mean(dim=0), states[positive].mean(dim=0)
    direction = high - low
    return 2 * (states - (low + high) / 2) @ direction / (direction @ direction + 1e-6)


def certify_guard(folder: Path, *, seed: int = 0, steps: int | None = None) -> "GroundTruth":
    """Measure a guard organism on held-out bodies and write what is true of it beside its weights."""
    from subspace_probe.organisms.guard_certification import measure_guard
    from subspace_probe.organisms.truth import GroundTruth

    name = name_in(folder)
    recipe = GUARDS[name]
    truth = GroundTruth(
        organism=name,
        **measure_guard(load_module(folder), override=recipe.override),
        provenance=record(seed=recipe.seed + seed, steps=STEPS if steps is None else steps, start=""),
    )
    truth.save(folder)
    return truth
