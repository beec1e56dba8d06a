"""Forward hooks on Hugging Face modules: the default backend.

Hooks live only inside a pass, act only on the thread that started it, and never touch hooks that others registered.
The user's model is not changed.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_probe.core.edits import NO_EDITS, EditContext, EditMap, compose
from subspace_probe.core.errors import BackendError, ConfigError, SiteError, UnsupportedSite
from subspace_probe.core.protocols import Generation, ModelSpec, Prefix, Run, Step
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models import resume
from subspace_probe.models.hooks import Hook, Pass, Recorder, Stop, hook_block, registered
from subspace_probe.models.identities import check_identities, require_modules
from subspace_probe.models.layouts import Layout, layout_of


@final
class NativeModel:
    """The native backend over one Hugging Face model.

    Args:
        model: in eval mode. Its weights are shared, not copied.
        name: how reports call it.

    Raises:
        BackendError: training mode, a compiled model, an unknown family, or one whose residual identities fail.
    """

    def __init__(self, model: nn.Module, *, name: str) -> None:
        if model.training:
            raise BackendError("The model is in training mode, where dropout makes passes differ. Call model.eval().")
        if hasattr(model, "_orig_mod"):
            raise BackendError("The model is compiled, and compiled models ignore hooks. Pass the uncompiled model.")
        self.hf: Any = model
        self.layout: Layout = layout_of(self.hf.config)
        self.base: Any = self.hf.base_model
        self.blocks = list(self.base.get_submodule(self.layout.blocks))
        require_modules(self.blocks[0], self.layout, type(self.hf).__name__)
        self._spec = _spec(self.hf, self.layout, len(self.blocks), name)
        self._takes = frozenset(inspect.signature(self.hf.forward).parameters)
        check_identities(self, self.blocks, self.layout, self.device)

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._spec

    def named(self, name: str) -> "NativeModel":
        """The same model under another name."""
        other = copy.copy(self)
        other._spec = replace(self._spec, name=name)
        return other

    @property
    def _attention(self) -> str:
        return str(getattr(self.hf.config, "_attn_implementation", ""))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.base.get_input_embeddings().weight.device

    def width(self, site: Site) -> int:
        """Width of a site's activations."""
        self._require(site)
        if site.stream == "z":
            return self._spec.d_head if site.head is not None else self._spec.d_head * self._spec.n_heads
        if site.stream == "mlp_post":
            weight = self.blocks[site.layer].get_submodule(self.layout.mlp_post).weight
            return next(
                size for size in weight.shape if size != self._spec.d_model or weight.shape[0] == weight.shape[1]
            )
        return self._spec.d_model

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix that reads tokens from the final state.

        Raises:
            ConfigError: the model has none.
        """
        head = self.hf.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{self._spec.family} has no unembedding. Load a model with a language-model head.")
        return head.weight.detach()

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
    ) -> Run:
        """One forward pass with some sites read and some edited.

        Args:
            batch: tokenised prompts; ignored but for positions where `prefix` is given.
            reads: sites to return, after their edit where they are edited.
            writes: edits by site. Those behind `stop_after` are left out, since nothing could see them.
            grad: keep the graph, so that gradients flow through edits.
            stop_after: leave the pass after this site; logits are then None.
            logits_to_keep: unembed only that many last positions; 0 means all.
            prefix: continue from this state instead of from the tokens; sites below it cannot be asked for.

        Raises:
            SiteError: a site that does not exist, lies below the prefix, or did not fire.
            ShapeError: an edit returned another shape or non-finite values.
        """
        batch = (prefix.batch if prefix else batch).to(self.device)
        state = self._state(reads, writes, grad, stop_after)
        start = prefix.column if prefix else 0
        state.ctx = EditContext(batch, batch.positions[:, start:], batch.mask[:, start:])
        logits: Tensor | None = None
        with torch.set_grad_enabled(grad), self._hooked(state):
            try:
                if prefix is not None:
                    logits = self._continue(prefix, logits_to_keep)
                else:
                    logits, _ = self._forward(batch, logits_to_keep)
            except Stop:
                logits = None
        self._require_fired(state)
        return Run(logits, self._as_asked(reads, state))

    def prefix(self, batch: TokenBatch, layer: int, *, column: int = 0, writes: EditMap = NO_EDITS) -> Prefix:
        """Run up to block `layer` once, to continue from there many times with `run(prefix=...)`.

        Args:
            column: first column of the batch that the passes to come may edit; columns before it are not run again,
                and reads of those passes start at it. Ignored where a block does not keep all its keys.
            writes: edits below `layer`, part of the state that is kept.

        Raises:
            SiteError: no such layer, or an edit at it or above, which belongs to the passes that continue.
        """
        batch = batch.to(self.device)
        layer = Site(layer).resolve(self._spec.n_layers).layer
        state = self._state((), writes, False, None)
        if above := sorted(site.short for site in state.writes if site.layer >= layer):
            raise SiteError(f"Edits at {', '.join(above)} lie above a prefix of layer {layer}. Give them to run().")
        state.ctx = EditContext(batch, batch.positions, batch.mask)
        later, width = range(layer, self._spec.n_layers), batch.ids.shape[1]
        recorders = {index: Recorder(state) for index in later}
        hooks = [Hook(self.blocks[index], recorder, entry=True) for index, recorder in recorders.items()]
        reusable = 0 < column < width and not self._spec.encoder and self._attention in ("sdpa", "eager")
        with torch.no_grad(), self._hooked(state), registered(hooks):
            cache = self._forward(batch, 1, use_cache=reusable)[1]
        cached = resume.earlier_keys(cache, later, column, width) if reusable else None
        calls = {index: resume.named_call(self.blocks[index], recorder.rest) for index, recorder in recorders.items()}
        hidden = recorders[layer].inputs[0]
        if cached is None:
            return Prefix(batch, layer, hidden, calls)
        cut = {i: resume.from_column(call, column, width, self._attention) for i, call in calls.items()}
        return Prefix(batch, layer, hidden[:, column:], cut, column, cached)

    def generate(
        self,
        batch: TokenBatch,
        *,
        reads: Collection[Site] = (),
        writes: EditMap = NO_EDITS,
        max_new_tokens: int,
        use_cache: bool = True,
        on_step: Callable[[Step], Sequence[bool]] | None = None,
    ) -> Generation:
        """Greedy decoding under edits.

        Positions are absolute: an edit of the prompt acts on the prompt's pass, one of generated tokens on theirs,
        so the text is the same with the cache on and off.

        Args:
            reads: sites given to `on_step`, from the very pass that produced the token.
            on_step: called after every step; a False stops that row.

        Raises:
            ConfigError: an encoder, or a prompt and answer longer than the context.
        """
        self._require_generation(batch, max_new_tokens)
        batch = batch.to(self.device)
        state = self._state(reads, writes, False, None)
        stop_ids = _end_ids(self.hf)
        ids, mask = batch.ids, batch.mask
        alive = torch.ones(batch.size, dtype=torch.bool, device=self.device)
        lengths = torch.zeros(batch.size, dtype=torch.long, device=self.device)
        produced: list[Tensor] = []
        cache: Any = None
        with torch.no_grad(), self._hooked(state):
            for step in range(max_new_tokens):
                shown = slice(None) if cache is None else slice(-1, None)
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                state.ctx = EditContext(batch, positions[:, shown], mask[:, shown], step)
                out = self.hf(
                    input_ids=ids[:, shown],
                    attention_mask=mask.long(),
                    position_ids=positions[:, shown],
                    past_key_values=cache,
                    use_cache=use_cache,
                    **self._keep(1),
                )
                cache = out.past_key_values if use_cache else None
                token = out.logits[:, -1].argmax(-1)
                token = torch.where(alive, token, stop_ids[0] if stop_ids else 0)
                lengths += alive
                produced.append(token)
                alive = alive & ~torch.isin(token, torch.tensor(stop_ids, device=self.device, dtype=token.dtype))
                if on_step is not None:
                    # without a cache the pass saw every token again
                    seen = {site: x if step == 0 else x[:, -1:] for site, x in self._as_asked(reads, state).items()}
                    going = on_step(Step(step, token, seen))
                    alive = alive & torch.tensor(list(going), dtype=torch.bool, device=self.device)
                if not bool(alive.any()):
                    break
                ids = torch.cat([ids, token[:, None]], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        self._require_fired(state)
        return Generation(torch.stack(produced, dim=1), lengths)

    def _state(self, reads: Collection[Site], writes: EditMap, grad: bool, stop_after: Site | None) -> Pass:
        n_layers = self._spec.n_layers
        # composed, since -1 and the last layer are one site
        resolved = compose(*({site.resolve(n_layers): edit} for site, edit in writes.items()))
        wanted = frozenset(site.resolve(n_layers) for site in reads)
        stop = None if stop_after is None else stop_after.resolve(n_layers)
        for site in (*wanted, *resolved, *([stop] if stop else [])):
            self._require(site)
        if stop is not None:
            resolved = {site: edit for site, edit in resolved.items() if site.order <= stop.order}
        return Pass(wanted, resolved, self._spec.n_heads, stop, grad)

    def _as_asked(self, reads: Collection[Site], state: Pass) -> dict[Site, Tensor]:
        """What was read, in forward order, by the very sites the caller named (-1 stays -1)."""
        resolved = {site: site.resolve(self._spec.n_layers) for site in reads}
        return {site: state.captured[resolved[site]] for site in sorted(resolved, key=lambda s: resolved[s].order)}

    def _require(self, site: Site) -> None:
        reason = self._spec.unsupported.get(site.stream)
        site.resolve(self._spec.n_layers)
        if reason is None and site.stream == "mlp_post" and not _has(self.blocks[site.layer], self.layout.mlp_post):
            reason = "its experts are one fused module, so no single down projection can be hooked. Use mlp_out."
        if reason is not None:
            raise UnsupportedSite(f"{site.short} was asked for, but {self._spec.family} does not have it: {reason}")
        if site.head is not None and not 0 <= site.head < self._spec.n_heads:
            raise SiteError(f"{site.short} was asked for, but the model has heads 0 to {self._spec.n_heads - 1}.")

    def _require_fired(self, state: Pass) -> None:
        stop = {state.stop_after} if state.stop_after else set[Site]()
        missing = sorted({*state.reads, *state.writes, *stop} - state.fired, key=lambda site: site.order)
        if missing:
            names = ", ".join(site.short for site in missing)
            raise SiteError(
                f"These sites were asked for but never fired: {names}. The pass stopped before them, started above "
                "them (prefix), or the model skipped their block."
            )

    def _require_generation(self, batch: TokenBatch, new: int) -> None:
        if self._spec.encoder:
            raise ConfigError(f"{self._spec.family} is an encoder and cannot generate. Use a decoder model.")
        if new < 1:
            raise ConfigError(f"max_new_tokens is {new}; it must be at least 1.")
        longest = int(batch.lengths.max())
        if longest + new > self._spec.context:
            raise ConfigError(
                f"{longest} prompt tokens and {new} new ones exceed the context of {self._spec.context} tokens. "
                "Shorten the prompts or lower max_new_tokens."
            )

    def _forward(self, batch: TokenBatch, logits_to_keep: int, *, use_cache: bool = False) -> tuple[Tensor | None, Any]:
        out = self.hf(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            **({} if self._spec.encoder else {"use_cache": use_cache}),
            **self._keep(logits_to_keep),
        )
        logits = getattr(out, "logits", None)
        kept = logits if logits is None or not logits_to_keep else logits[:, -logits_to_keep:]
        return kept, getattr(out, "past_key_values", None)

    def _keep(self, count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if count and "logits_to_keep" in self._takes else {}

    def _continue(self, prefix: Prefix, logits_to_keep: int) -> Tensor | None:
        hidden = resume.continued(self.blocks, prefix)
        head = self.hf.get_output_embeddings()
        if head is None or self._spec.encoder:  # an encoder's head is more than a norm and a matrix
            return None
        logits = head(self.base.get_submodule(self.layout.norm)(hidden[:, -logits_to_keep:]))
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @contextmanager
    def _hooked(self, state: Pass) -> Generator[None]:
        """Register the hooks a pass needs; they are gone when the block is left, however it is left."""
        sites = {*state.reads, *state.writes} | ({state.stop_after} if state.stop_after else set())
        hooks: list[Hook] = []
        for layer in sorted({site.layer for site in sites}):
            streams: set[Stream] = {site.stream for site in sites if site.layer == layer}
            hooks += hook_block(self.blocks[layer], self.layout, layer, streams, state)
        with registered(hooks):
            yield


def _spec(hf: Any, layout: Layout, n_layers: int, name: str) -> ModelSpec:
    config = hf.config
    n_heads = int(config.num_attention_heads)
    z = hf.base_model.get_submodule(layout.blocks)[0].get_submodule(layout.z)
    # GPT-2's Conv1D keeps (in, out), Linear (out, in); the output side is d_model in both
    z_width = next((size for size in z.weight.shape if size != config.hidden_size), int(config.hidden_size))
    return ModelSpec(
        name=name,
        family=type(hf).__name__,
        n_layers=n_layers,
        d_model=int(config.hidden_size),
        n_heads=n_heads,
        d_head=int(z_width) // n_heads,
        d_vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        unsupported=layout.unsupported(config),
        encoder=layout.post_norm,
        learned_positions=layout.learned_positions,
    )


def _end_ids(hf: Any) -> list[int]:
    """Tokens that end a generation."""
    ends = hf.generation_config.eos_token_id if getattr(hf, "generation_config", None) else hf.config.eos_token_id
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]


def _has(block: nn.Module, path: str) -> bool:
    return bool(path) and any(name == path for name, _ in block.named_modules())
