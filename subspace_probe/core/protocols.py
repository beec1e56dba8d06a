"""What the floors above implement. Protocols only; nothing here runs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.edits import NO_EDITS, EditMap
from subspace_probe.core.errors import PositionError
from subspace_probe.core.findings import Finding
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import TokenBatch, Where


@final
@dataclass(frozen=True)
class ModelSpec:
    """What a model is, in the package's own words.

    Attributes:
        name: what the user loaded.
        family: the Hugging Face class.
        unsupported: streams the family does not have, with the reason.
        encoder: True for models without generation or instruction positions.
        learned_positions: True where a token's state at layer 0 depends on its position.
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_vocab: int
    context: int
    unsupported: Mapping[Stream, str] = field(default_factory=dict[Stream, str])
    encoder: bool = False
    learned_positions: bool = False


@final
@dataclass(frozen=True, eq=False)
class Run:
    """What one pass gave.

    Attributes:
        logits: shape [batch, kept, d_vocab]; None where the pass was stopped before.
        reads: each site asked for, after its edit, if it was edited; shape [batch, pos, width], or [n, width] where
            only n tokens were asked for; a head's `z` [..., d_head]; patterns [batch, head, pos, pos].
    """

    logits: Float[Tensor, "batch kept d_vocab"] | None
    reads: Mapping[Site, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Prefix:
    """The state in front of one block, from which passes can be continued as often as needed.

    Attributes:
        hidden: resid_pre of block `layer` from `column` on, shape [batch, pos - column, d_model].
        calls: what each later block is called with besides its input, by name; the backend's own.
        column: first column of the batch that is run again; edits touch no column before it.
        cached: keys and values of the columns before it, by layer, shape [batch, heads, column, d_head].
    """

    batch: TokenBatch
    layer: int
    hidden: Float[Tensor, "batch rest d_model"]
    calls: Mapping[int, Mapping[str, Any]]
    column: int = 0
    cached: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])

    def repeat(self, times: int) -> "Prefix":
        """The state stacked `times` times on the batch axis, to run several conditions in one pass."""
        n = self.batch.size
        done: dict[int, Tensor] = {}
        calls = {layer: _stacked(call, n, times, done) for layer, call in self.calls.items()}
        cached = {layer: _stacked(pair, n, times, done) for layer, pair in self.cached.items()}
        hidden = self.hidden.repeat(times, 1, 1)
        return replace(self, batch=self.batch.repeat(times), hidden=hidden, calls=calls, cached=cached)


def _stacked(value: Any, n: int, times: int, done: dict[int, Tensor]) -> Any:
    """Every tensor with n rows, in tuples and dictionaries too, repeated along axis 0; shared ones stay shared."""
    if isinstance(value, Tensor):
        # ALiBi biases are [n * heads, 1, pos]
        biases = value.ndim == 3 and value.shape[1] == 1 and value.shape[0] % n == 0
        if not value.ndim or (value.shape[0] != n and not biases):
            return value
        if id(value) not in done:
            done[id(value)] = value.repeat(times, *[1] * (value.ndim - 1))
        return done[id(value)]
    if isinstance(value, tuple):
        return tuple(_stacked(item, n, times, done) for item in cast("tuple[Any, ...]", value))
    if isinstance(value, dict):
        return {name: _stacked(item, n, times, done) for name, item in cast("dict[str, Any]", value).items()}
    return value


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One step of a generation.

    Attributes:
        tokens: the token each row has just produced, shape [batch].
        reads: sites read in that very pass, at its tokens.
    """

    index: int
    tokens: Int[Tensor, " batch"]
    reads: Mapping[Site, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated.

    Attributes:
        ids: generated tokens, shape [batch, new]; rows that ended early are padded.
        lengths: number of tokens each row produced, the end token included, shape [batch].
    """

    ids: Int[Tensor, "batch new"]
    lengths: Int[Tensor, " batch"]


@runtime_checkable
class Model(Protocol):
    """A backend: one forward pass with some sites read and some edited."""

    @property
    def spec(self) -> ModelSpec: ...

    def width(self, site: Site) -> int: ...

    def run(
        self,
        batch: TokenBatch,
        *,
        reads: Collection[Site] = (),
        writes: EditMap = NO_EDITS,
        grad: bool = False,
        stop_after: Site | None = None,
        logits_to_keep: int = 0,
        prefix: Prefix | None = None,
        where: Where | None = None,
        dtype: torch.dtype | None = None,
    ) -> Run: ...

    def prefix(self, batch: TokenBatch, layer: int, *, column: int = 0, writes: EditMap = NO_EDITS) -> Prefix: ...

    def generate(
        self,
        batch: TokenBatch,
        *,
        reads: Collection[Site] = (),
        writes: EditMap = NO_EDITS,
        max_new_tokens: int,
        use_cache: bool = True,
        on_step: Callable[[Step], Sequence[bool]] | None = None,
    ) -> Generation: ...

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]: ...


@runtime_checkable
class Part(Protocol):
    """What an intervention was made from: a subspace, or states to put in. It fits one width and maybe one model."""

    @property
    def fingerprint(self) -> str | None: ...
    def require_model(self, fingerprint: str) -> None: ...
    def require_width(self, width: int, site: Site) -> None: ...


@runtime_checkable
class Intervention(Protocol):
    """A set of edits and the claim they test.

    `subspace` is None where whole states are edited. `parts` says what is used at which site, so that it can be
    checked against a model before anything runs.
    """

    @property
    def subspace(self) -> Subspace | None: ...
    @property
    def where(self) -> Where: ...
    def edits(self, n_layers: int) -> EditMap: ...
    def parts(self, n_layers: int) -> Sequence[tuple[Site, Part]]: ...
    def with_subspace(self, subspace: Subspace) -> "Intervention": ...


def touches(batch: TokenBatch, intervention: Intervention, *, new: int = 0) -> bool:
    """Whether an intervention's `where` means any token of these prompts, or of those generated and read again."""
    ends = batch.lengths[:, None] + max(new - 1, 0)
    positions = torch.arange(int(ends.max())).expand(batch.size, -1)
    return bool((batch.select(intervention.where, positions) & (positions < ends)).any())


def require_scopes(batch: TokenBatch, interventions: Sequence[Intervention], *, new: int = 0) -> None:
    """Check that each intervention touches a token of these prompts.

    Args:
        new: how many tokens will be generated; the last of them is in no pass.

    Raises:
        PositionError: one that would silently do nothing.
    """
    for intervention in interventions:
        if not touches(batch, intervention, new=new):
            made = f"of the prompts, nor of the {new} new ones that are read again" if new else "of the prompts"
            raise PositionError(
                f"{intervention!r} touches no token: none {made} is {str(intervention.where)!r}. Choose other tokens, "
                "such as 'prompt'" + (", or generate more." if new else ", or generate.")
            )


@runtime_checkable
class Finder(Protocol):
    """From activations to a subspace. Frozen settings; `fit` returns the result."""

    name: ClassVar[str]

    def fit(self, acts: Activations, site: Site) -> Subspace: ...


@runtime_checkable
class TokenSource(Protocol):
    """What turns words into the tokens a model would answer with."""

    def token_ids(self, words: Sequence[str]) -> list[int]: ...
    def behaviour_ids(self, behaviour: str) -> list[int]: ...


@runtime_checkable
class Metric(Protocol):
    """Behaviour to one number a prompt."""

    def __call__(self, logits: Float[Tensor, "n d_vocab"], prompts: Sequence[Prompt]) -> Float[Tensor, " n"]: ...


__all__ = [
    "Contrast",
    "Finder",
    "Finding",
    "Generation",
    "Intervention",
    "Metric",
    "Model",
    "ModelSpec",
    "Part",
    "Prefix",
    "Run",
    "Step",
    "TokenSource",
    "require_scopes",
    "touches",
]
