"""Forward hooks on Hugging Face modules: the default backend.

Hooks live only inside a pass, act only on the thread that started it, and never touch hooks that others registered.
The user's model is not changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspace_probe.core.edits import NO_EDITS, EditMap
from subspace_probe.core.protocols import Prefix
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models import resume
from subspace_probe.models.backend import Backend, Output
from subspace_probe.models.climbing import Entry, Keeper, Put, Recording, climbed, keeping
from subspace_probe.models.hooks import Hook, Pass, Recorder, Stop, hook_blocks, registered

CHECKED = 4
"""So many tokens of a prompt are enough to check continuations on: one before the replaced one, and two behind it."""


@final
class NativeModel(Backend):
    """The native backend over one Hugging Face model, whose weights are shared, not copied."""

    def _call(self, state: Pass, inputs: dict[str, Any]) -> Output | None:
        with registered(hook_blocks(self.blocks, self.layout, state)):
            try:
                out = self.hf(**inputs)
            except Stop:
                return None
        return Output(getattr(out, "logits", None), getattr(out, "past_key_values", None))

    def prefix(self, batch: TokenBatch, layer: int, *, column: int = 0, writes: EditMap = NO_EDITS) -> Prefix:
        """Run up to block `layer` once; what later blocks are called with is recorded. See `Backend.prefix`."""
        batch, entry, state = self._below(batch, layer, writes)
        later, width = range(entry.layer, self._spec.n_layers), batch.ids.shape[1]
        recorders = {index: Recorder(state) for index in later}
        hooks = [Hook(self.blocks[index], recorder, entry=True) for index, recorder in recorders.items()]
        reusable = 0 < column < width and not self._spec.encoder and self.attention in ("sdpa", "eager")
        inputs = self._inputs(batch, 1) | ({"use_cache": True} if reusable else {})
        with torch.no_grad(), registered(hooks):
            out = self._call(state, inputs)
        cache = None if out is None else out.cache
        cached = resume.earlier_keys(cache, later, column, width) if reusable else None
        calls = {index: resume.named_call(self.blocks[index], recorder.rest) for index, recorder in recorders.items()}
        hidden = recorders[entry.layer].inputs[0]
        if cached is None:
            return Prefix(batch, entry.layer, hidden, calls)
        cut = {i: resume.from_column(call, column, width, self.attention) for i, call in calls.items()}
        return Prefix(batch, entry.layer, hidden[:, column:], cut, column, cached)

    def record(self, batch: TokenBatch) -> Recording | None:
        """Run once and keep what any continuation needs. See `Records.record`."""
        if self._spec.encoder or self.hf.get_output_embeddings() is None or not bool(batch.mask.all()):
            return None
        recording = self._recorded(batch)
        if recording is None or not self._reproduced(recording):
            return None
        some = batch.rows([0])
        few = self._recorded(replace(some, ids=some.ids[:, :CHECKED], mask=some.mask[:, :CHECKED]))
        return recording if few is not None and self._followed(few) else None

    def _recorded(self, batch: TokenBatch) -> Recording | None:
        """One pass with everything kept."""
        n_layers, width, last = self._spec.n_layers, batch.ids.shape[1], Site(-1).resolve(self._spec.n_layers)
        batch, _, state = self._below(batch, 0, NO_EDITS)
        state.reads = frozenset({last})
        recorders, keepers = (
            [Recorder(state) for _ in self.blocks],
            [Keeper(state, Recorder(state)) for _ in self.blocks],
        )
        hooks = [Hook(block, recorder, entry=True) for block, recorder in zip(self.blocks, recorders, strict=True)]
        for block, keeper in zip(self.blocks, keepers, strict=True):
            hooks += keeping(block, self.layout, keeper)
        reusable = self.attention in ("sdpa", "eager")
        inputs = self._inputs(batch, 1) | ({"use_cache": True} if reusable else {})
        with torch.no_grad(), registered(hooks):
            out = self._call(state, inputs)
        if out is None or out.logits is None:
            return None
        return Recording(
            batch,
            (*(recorder.inputs[0] for recorder in recorders), state.captured[last]),
            {i: resume.named_call(self.blocks[i], recorder.rest) for i, recorder in enumerate(recorders)},
            resume.earlier_keys(out.cache, range(n_layers), width, width) if reusable else None,
            {i: keeper.outputs for i, keeper in enumerate(keepers)},
            out.logits[:, -1],
            self.attention,
        )

    def _reproduced(self, recording: Recording) -> bool:
        """Whether rows in which a token is replaced by itself end where the recorded pass did."""
        n_layers, row = self._spec.n_layers, torch.tensor([recording.batch.size - 1])
        column = torch.tensor([recording.width // 2])
        entries = [Entry(at, row, column, recording.hidden[at][row, column]) for at in sorted({0, n_layers - 1})]
        few = torch.arange(min(64, self._spec.d_vocab))
        ends, found = recording.hidden[-1][row, -1], self._tried(recording, entries)
        if found is None or not _close(found, ends.expand_as(found)):
            return False
        return _close(self.unembed(ends, few), recording.logits[row][:, few])

    def _followed(self, recording: Recording) -> bool:
        """Whether rows in which a token is *changed*, each in front of another block, end where plain passes do.

        A token that is replaced by itself cannot tell what was taken from the recording though it should have changed.
        """
        layers, column = range(self._spec.n_layers), (recording.width - 1) // 2
        generator, first, at = torch.Generator().manual_seed(0), torch.tensor([0]), torch.tensor([column])
        entries: list[Entry] = []
        for layer in layers:
            own = recording.hidden[layer][first, at].float()
            noise = torch.randn(own.shape, generator=generator).to(own)
            entries.append(Entry(layer, first, at, own + own.square().mean().sqrt() * noise))
        found, last = self._tried(recording, entries), Site(-1)
        if found is None:
            return False
        writes = {Site(e.layer, "resid_pre"): Put(torch.tensor([e.layer]), at, e.states) for e in entries}
        run = self.run(recording.batch.repeat(len(layers)), reads=[last], writes=writes, stop_after=last)
        return _close(found, run.reads[last][:, -1])

    def _tried(self, recording: Recording, entries: Sequence[Entry]) -> Tensor | None:
        """What `climb` gives; None where blocks cannot be called like that."""
        try:
            return self.climb(recording, entries)
        except (RuntimeError, TypeError, IndexError):
            return None

    @torch.no_grad()
    def climb(self, recording: Recording, entries: Sequence[Entry]) -> Float[Tensor, "row d_model"]:
        """Continue every entry to the end. See `Records.climb`."""
        return climbed(self.blocks, self.layout, recording, entries)

    @torch.no_grad()
    def unembed(
        self, states: Float[Tensor, "row d_model"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "row token"]:
        """Final norm and unembedding. See `Records.unembed`."""
        return self._unembedded(states, tokens)

    def _continue(self, state: Pass, prefix: Prefix, logits_to_keep: int) -> Tensor | None:
        with registered(hook_blocks(self.blocks, self.layout, state)):
            try:
                hidden = resume.continued(self.blocks, prefix)
            except Stop:
                return None
        if self.hf.get_output_embeddings() is None or self._spec.encoder:
            return None  # an encoder's head is more than a norm and a matrix
        return self._unembedded(hidden[:, -logits_to_keep:])

    def _unembedded(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        head, hidden = self.hf.get_output_embeddings(), self.base.get_submodule(self.layout.norm)(hidden)
        if tokens is None or type(head) is not nn.Linear:
            logits = head(hidden)
            logits = logits if tokens is None else logits[..., tokens]
        else:
            logits = nn.functional.linear(hidden, head.weight[tokens], None if head.bias is None else head.bias[tokens])
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two ways of computing the same agree up to rounding."""
    tolerance = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
    return float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
