"""Many continuations of one recorded pass at a time, each from its own block and token.

Rows join the batch in front of their block, so that a block runs once for all rows that entered at or below it. Nothing
is computed twice that cannot differ: not what lies below a row's block, not the tokens before the one it replaces, and
in the block where it joins not the queries, keys and values of the other tokens, which are the recorded ones.
In the last block only the last token's output is computed, since only that one is unembedded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspace_probe.core.edits import NO_EDITS, EditContext
from subspace_probe.core.protocols import Prefix
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models.hooks import Hook, Pass, Recorder, module_input, registered
from subspace_probe.models.layouts import Layout
from subspace_probe.models.resume import Cached, completed, from_column


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """States that replace recorded ones in front of one block, each in a row of its own.

    Attributes:
        layer: the block; the number of blocks for states behind the last one.
        prompts: which recorded prompt each row continues, shape [row].
        columns: the token that is replaced in it, shape [row].
        states: what is put there, shape [row, d_model].
    """

    layer: int
    prompts: Int[Tensor, " row"]
    columns: Int[Tensor, " row"]
    states: Float[Tensor, "row d_model"]


@final
@dataclass(frozen=True, eq=False)
class Put:
    """An edit that puts states at single tokens of a pass.

    Attributes:
        rows: of the batch, shape [cell].
        columns: of the batch, shape [cell].
        states: shape [cell, width].
    """

    rows: Int[Tensor, " cell"]
    columns: Int[Tensor, " cell"]
    states: Float[Tensor, "cell width"]

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        shown = self.columns - (ctx.batch.ids.shape[1] - x.shape[1])  # a continued pass begins at a later column
        return x.index_put((self.rows.to(x.device), shown.to(x.device)), self.states.to(x))


@final
@dataclass(frozen=True, eq=False)
class Recording:
    """One clean pass, from which any token of any block can be continued without another one.

    Attributes:
        batch: the prompts, unpadded and of one length.
        hidden: resid_pre of every block, and resid_post of the last one, [n, pos, d_model] each.
        calls: what each block was called with besides its input, by name.
        cached: keys and values of all tokens by layer; None where a block has not kept them all.
        projected: what the matrices that read attention's own input gave, by layer and module, [n, pos, width] each.
        logits: of the last token, shape [n, d_vocab].
        attention: the attention implementation.
    """

    batch: TokenBatch
    hidden: tuple[Float[Tensor, "n pos d_model"], ...]
    calls: Mapping[int, Mapping[str, Any]]
    cached: Cached | None
    projected: Mapping[int, Mapping[nn.Module, Tensor]]
    logits: Float[Tensor, "n d_vocab"]
    attention: str

    @property
    def width(self) -> int:
        """Number of tokens of every prompt."""
        return self.batch.ids.shape[1]

    def at(self, layer: int) -> Prefix:
        """The state in front of a block, to run edits of that block with."""
        return Prefix(self.batch, layer, self.hidden[layer], self.calls)

    def call(self, layer: int, column: int, prompts: Int[Tensor, " row"], hidden: Tensor) -> dict[str, Any]:
        """A block's arguments for some prompts, the tokens from `column` on, with their own cache."""
        call, earlier = self.calls[layer], None
        if column and self.cached is not None:
            call = from_column(call, column, self.width, self.attention)
            earlier = _Earlier(*(kept[prompts, :, :column] for kept in self.cached[layer]))
        chosen = {name: _chosen(value, self.batch.size, prompts) for name, value in call.items()}
        return completed(chosen, earlier, hidden)


@runtime_checkable
class Records(Protocol):
    """A backend that can continue one pass from many blocks and tokens at a time."""

    def record(self, batch: TokenBatch) -> Recording | None:
        """One clean pass over prompts of one length; None where this family cannot be continued so."""
        ...

    def climb(self, recording: Recording, entries: Sequence[Entry]) -> Float[Tensor, "row d_model"]:
        """Continue every entry; the last token's state behind the last block, rows in the order of the entries.

        Args:
            recording: what `record` gave.
            entries: in ascending order of their layers.
        """
        ...

    def unembed(
        self, states: Float[Tensor, "row d_model"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "row token"]:
        """Final norm and unembedding of what `climb` gave; only the logits of `tokens`, where they are given."""
        ...


def keeping(block: nn.Module, layout: Layout, keeper: "Keeper") -> list[Hook]:
    """Hooks that keep what a block's matrices give whose input is attention's own, token by token.

    Only those can be reused where one token is replaced: what is fed by anything else, as the output projection and
    the parts of adapters on it are, has seen other tokens, and so has changed at all tokens behind.
    """
    from transformers.pytorch_utils import Conv1D

    attention = block.get_submodule(layout.attention)
    matrices = [module for module in attention.modules() if isinstance(module, nn.Linear | Conv1D)]
    entering = Hook(attention, keeper.inputs, entry=True)
    return [entering, *(Hook(module, keeper, entry=False) for module in matrices)]


def climbed(
    blocks: Sequence[nn.Module], layout: Layout, recording: Recording, entries: Sequence[Entry]
) -> Float[Tensor, "row d_model"]:
    """Continue every entry to the end: the last token's state behind the last block, rows in the order of `entries`.

    Args:
        entries: in ascending order of their layers.
    """
    below = [entry for entry in entries if entry.layer < len(blocks)]
    rows = [_behind(recording, entry) for entry in entries if entry.layer == len(blocks)]
    if below:
        column = int(min(entry.columns.min() for entry in below)) if recording.cached is not None else 0
        hidden, prompts = recording.hidden[0][:0, column:], below[0].prompts[:0]
        for index in range(below[0].layer, len(blocks)):
            before = len(prompts)
            for entry in below:
                if entry.layer == index:
                    hidden = torch.cat([hidden, _joining(recording, entry, column).to(hidden)])
                    prompts = torch.cat([prompts, entry.prompts])
            joined = torch.cat([entry.columns for entry in below if entry.layer == index] or [prompts[:0]]) - column
            hooks = _unchanged(recording, index, before, prompts[before:], joined, column)
            if index == len(blocks) - 1:
                hooks += _last_only(blocks[index], layout)
            with registered(hooks):
                output = blocks[index](hidden, **recording.call(index, column, prompts, hidden))
            hidden = output[0] if isinstance(output, tuple) else output
        rows.insert(0, hidden[:, -1])
    return torch.cat(rows)


def _joining(recording: Recording, entry: Entry, column: int) -> Float[Tensor, "row rest d_model"]:
    """What joins the batch: the recorded states with one token of each row replaced."""
    joining = recording.hidden[entry.layer][entry.prompts, column:]
    joining[torch.arange(len(joining)), entry.columns - column] = entry.states.to(joining)
    return joining


def _behind(recording: Recording, entry: Entry) -> Float[Tensor, "row d_model"]:
    """States behind the last block, where only the last token's is read any more."""
    final_states = recording.hidden[-1][entry.prompts, -1]
    is_last = (entry.columns == recording.width - 1).to(final_states.device)
    return torch.where(is_last[:, None], entry.states.to(final_states), final_states)


@final
@dataclass(frozen=True, eq=False)
class _Earlier:
    """In the place of a cache, for one block of one pass: puts the earlier tokens in front, and keeps nothing."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


def _pass() -> Pass:
    """Says which thread's passes the hooks act on; nothing is read or edited."""
    return Pass(frozenset(), NO_EDITS, 1, None, grad=False)


def _unchanged(
    recording: Recording, layer: int, before: int, prompts: Tensor, columns: Tensor, start: int
) -> list[Hook]:
    """Hooks by which rows that join here are projected at their replaced token only."""
    hooks: list[Hook] = []
    for module, kept in recording.projected[layer].items() if len(prompts) else ():
        joined = _Joined(_pass(), before, columns, kept[prompts, start:])
        hooks += [Hook(module, joined.enter, entry=True), Hook(module, joined.leave, entry=False)]
    return hooks


@final
@dataclass(frozen=True, eq=False)
class _Joined:
    """Projects all tokens of the rows that came from below, and one token of each row that joins.

    Attributes:
        before: number of rows that came from below.
        columns: the replaced token of each joining row.
        kept: what the module gave for the joining rows in the recorded pass, [row, rest, width]; changed in place.
    """

    state: Pass
    before: int
    columns: Tensor
    kept: Tensor

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.state.mine:
            return None
        x, rest, named = module_input(args, kwargs)
        new = x[self.before :][torch.arange(len(self.columns)), self.columns]
        return (torch.cat([x[: self.before].flatten(0, 1), new]), *rest), named

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.state.mine:
            return None
        split = len(output) - len(self.columns)
        self.kept[torch.arange(len(self.columns)), self.columns] = output[split:]
        return torch.cat([output[:split].unflatten(0, (self.before, self.kept.shape[1])), self.kept])


def _last_only(block: nn.Module, layout: Layout) -> list[Hook]:
    """Hooks by which attention's output projection and the MLP see the last token only.

    What they return is added to the stream of all tokens, and is right where it is read: at the last one.
    """
    mlp = layout.mlp_post.rpartition(".")[0] or layout.mlp
    narrow = _LastToken(_pass())
    return [Hook(block.get_submodule(path), narrow, entry=True) for path in (layout.z, mlp)]


@final
@dataclass(frozen=True, eq=False)
class _LastToken:
    """Lets a module see the last token only."""

    state: Pass

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or not self.state.mine:
            return None
        x, rest, named = module_input(args, kwargs)
        return (x[..., -1:, :], *rest), named


@final
@dataclass(frozen=True, eq=False)
class Keeper:
    """Keeps what the modules give in one pass that are given the very tensor that attention was.

    Attributes:
        inputs: records what attention is called with.
        outputs: what the modules gave.
    """

    state: Pass
    inputs: Recorder
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict[nn.Module, Tensor])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.state.mine and args and any(args[0] is given for given in self.inputs.inputs):
            self.outputs[module] = output


def _chosen(value: Any, n: int, prompts: Tensor) -> Any:
    """The rows of some prompts, of every tensor with n rows, in tuples and dictionaries too."""
    if isinstance(value, Tensor):
        if not value.ndim or value.shape[0] == 1:
            return value  # the same for all rows
        if value.ndim == 3 and value.shape[1] == 1 and value.shape[0] % n == 0:  # ALiBi biases [n * heads, 1, pos]
            return value.unflatten(0, (n, -1))[prompts].flatten(0, 1)
        return value[prompts] if value.shape[0] == n else value
    if isinstance(value, tuple):
        return tuple(_chosen(item, n, prompts) for item in value)
    if isinstance(value, dict):
        return {name: _chosen(item, n, prompts) for name, item in value.items()}
    return value
