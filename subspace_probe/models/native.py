"""Forward hooks on Hugging Face modules: the default backend.

Hooks live only inside a pass, act only on the thread that started it, and never touch hooks that others registered.
The user's model is not changed.
"""

from typing import Any, final

import torch
from torch import Tensor

from subspace_probe.core.edits import NO_EDITS, EditMap
from subspace_probe.core.protocols import Prefix
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models import resume
from subspace_probe.models.backend import Backend, Output
from subspace_probe.models.hooks import Hook, Pass, Recorder, Stop, hook_blocks, registered


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

    def _continue(self, state: Pass, prefix: Prefix, logits_to_keep: int) -> Tensor | None:
        with registered(hook_blocks(self.blocks, self.layout, state)):
            try:
                hidden = resume.continued(self.blocks, prefix)
            except Stop:
                return None
        head = self.hf.get_output_embeddings()
        if head is None or self._spec.encoder:  # an encoder's head is more than a norm and a matrix
            return None
        logits = head(self.base.get_submodule(self.layout.norm)(hidden[:, -logits_to_keep:]))
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
