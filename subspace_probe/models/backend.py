"""What the backends share: which sites exist, what a pass reads and edits, and how text is generated.

A backend adds one thing, `_call`: the model's own forward pass with the reads and edits of a `Pass` inside it.
Positions, stopping, prefixes, generation and every error are here, so that the hooking stacks can differ in nothing
else.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_probe.core.edits import NO_EDITS, EditContext, EditMap, Then, compose, needed_sites
from subspace_probe.core.errors import BackendError, ConfigError, SiteError, UnsupportedSite
from subspace_probe.core.keys import content_key
from subspace_probe.core.protocols import Generation, ModelSpec, Prefix, Run, Step
from subspace_probe.core.sites import READ_ONLY, Site
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.models.hooks import NO_PATTERN, Pass
from subspace_probe.models.identities import check_identities, require_modules
from subspace_probe.models.layouts import FUSED, Layout, layout_of
from subspace_probe.models.specs import mlp_widths, spec_of
from subspace_probe.models.weights import (
    adapters,
    architecture,
    bare,
    input_device,
    stored,
    version,
    weights_hash,
    weights_of,
)


class Backend(ABC):
    """One way of running a Hugging Face model with some sites read and some edited.

    Args:
        model: in eval mode.
        name: how reports call it.

    Raises:
        BackendError: training mode, a compiled model, an unknown family, or one whose residual identities fail.
    """

    def __init__(self, model: nn.Module, *, name: str) -> None:
        self.hf: Any = bare(model)
        self._require_eval()
        if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
            raise BackendError("The model is compiled, and compiled models ignore hooks. Pass the uncompiled model.")
        self.layout: Layout = layout_of(self.hf.config)
        self.base: Any = self.hf.base_model
        self.blocks: list[nn.Module] = list(self.base.get_submodule(self.layout.blocks))
        require_modules(self.blocks[0], self.layout, type(self.hf).__name__)
        self._spec = spec_of(self.hf, self.layout, self.blocks, name)
        self._mlp_widths = mlp_widths(self.blocks, self.layout, self._spec.d_model)
        self._hashed: tuple[tuple[int, ...], str] | None = None
        self._takes = frozenset(inspect.signature(self.hf.forward).parameters)
        self._prepare()
        check_identities(self, self.blocks, self.layout, self.device)

    def _prepare(self) -> None:  # noqa: B027  (nothing to do is a good answer)
        """What a backend builds before its first pass."""

    @property
    def _forms_patterns(self) -> bool:
        """Whether attention probabilities exist as a tensor; fused kernels never form them."""
        return self.attention == "eager"

    @property
    def attention(self) -> str:
        """The attention implementation, as Transformers calls it."""
        return str(getattr(self.hf.config, "_attn_implementation", ""))

    @abstractmethod
    def _call(self, state: Pass, inputs: dict[str, Any]) -> "Output | None":
        """One forward pass of the model on Hugging Face `inputs`, with the reads and edits of `state` in it.

        Returns:
            None where `state` ended the pass early.
        """

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._spec

    def named(self, name: str) -> "Backend":
        """The same model under another name."""
        other = copy.copy(self)
        other._spec = replace(self._spec, name=name)
        return other

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.base.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.hf.dtype

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a generation."""
        generation = getattr(self.hf, "generation_config", None)
        ends = (generation or self.hf.config).eos_token_id
        return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]

    def weights_key(self, *, anew: bool = False) -> str:
        """Hash of all weights, of the adapters that act on them, and of the configuration.

        Args:
            anew: hash the weights even if nothing is known to have changed them; writes through `.data` leave no trace.
        """
        weights = weights_of(self.hf)
        if anew or self._hashed is None or self._hashed[0] != version(weights):
            self._hashed = version(weights), weights_hash(self.hf, weights)
        return content_key([self._hashed[1], adapters(self.hf), architecture(self.hf.config)])

    def width(self, site: Site) -> int:
        """Width of a site's activations."""
        self._require(site)
        if site.stream == "pattern":
            raise UnsupportedSite(f"{site.short} has no width: patterns are [batch, head, pos, pos]. Read with run().")
        if site.stream == "z":
            return self._spec.d_head if site.head is not None else self._spec.d_head * self._spec.n_heads
        if site.stream == "mlp_post":
            return self._mlp_widths[site.resolve(self._spec.n_layers).layer] or 0
        return self._spec.d_model

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix that reads tokens from the final state.

        Raises:
            ConfigError: the model has none.
        """
        head = self.hf.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{self._spec.family} has no unembedding. Load a model with a language-model head.")
        name = next(name for name, module in self.hf.named_modules() if module is head)
        return stored(self.hf, f"{name}.weight", head.weight).detach()

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
            where: return only these tokens' states, gathered as they pass: shape [n, width] instead of
                [batch, pos, width], row by row of the batch, each in the order of its tokens.
            dtype: convert reads to it as they pass.

        Raises:
            SiteError: a site that does not exist, lies below the prefix, or did not fire.
            ShapeError: an edit returned another shape or non-finite values.
        """
        self._require_eval()
        batch = (prefix.batch if prefix else batch).to(self.device)
        state = self._state(reads, writes, grad, stop_after)
        state.dtype = dtype
        start = prefix.column if prefix else 0
        state.enter(EditContext(batch, batch.positions[:, start:], batch.mask[:, start:]), where)
        if where is not None and any(site.stream == "pattern" for site in state.reads):
            raise ConfigError("Attention patterns belong to pairs of tokens. Read them without where=.")
        with torch.set_grad_enabled(grad):
            if prefix is not None:
                self._require_above(state, prefix.layer)
                logits = self._continue(state, prefix, logits_to_keep)
            else:
                out = self._call(state, self._inputs(batch, logits_to_keep))
                logits = None if out is None else out.kept(logits_to_keep)
        self._require_fired(state)
        return Run(logits, self._as_asked(reads, state))

    def prefix(self, batch: TokenBatch, layer: int, *, column: int = 0, writes: EditMap = NO_EDITS) -> Prefix:
        """Run up to block `layer` once, to continue from there many times with `run(prefix=...)`.

        Args:
            column: first column of the batch that the passes to come may edit; columns before it are not run again,
                and reads of those passes start at it. Ignored where a backend or a block cannot continue there.
            writes: edits below `layer`, part of the state that is kept.

        Raises:
            SiteError: no such layer, or an edit at it or above, which belongs to the passes that continue.
        """
        batch, entry, state = self._below(batch, layer, writes)
        run = self.run(batch, reads=[entry], writes=state.writes, stop_after=entry)
        return Prefix(batch, entry.layer, run.reads[entry], {})

    def _continue(self, state: Pass, prefix: Prefix, logits_to_keep: int) -> Tensor | None:
        """Here a whole pass with the kept state put in front of its block: right, and no faster."""
        entry = Site(prefix.layer, "resid_pre")
        given = Given(prefix.hidden)
        state.writes = {**state.writes, entry: Then(given, state.writes[entry]) if entry in state.writes else given}
        out = self._call(state, self._inputs(prefix.batch.to(self.device), logits_to_keep))
        return None if out is None else out.kept(logits_to_keep)

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
        self._require_eval()
        self._require_generation(batch, max_new_tokens)
        batch = batch.to(self.device)
        state = self._state(reads, writes, False, None)
        stop_ids = self.end_ids
        ids, mask = batch.ids, batch.mask
        alive = torch.ones(batch.size, dtype=torch.bool, device=self.device)
        lengths = torch.zeros(batch.size, dtype=torch.long, device=self.device)
        produced: list[Tensor] = []
        cache: Any = None
        with torch.no_grad():
            for step in range(max_new_tokens):
                shown = slice(None) if cache is None else slice(-1, None)
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                state.enter(EditContext(batch, positions[:, shown], mask[:, shown], step))
                inputs = self._named_inputs(ids[:, shown], mask, positions[:, shown], 1)
                out = self._call(state, inputs | {"past_key_values": cache, "use_cache": use_cache})
                if out is None or out.logits is None:
                    raise ConfigError(f"{self._spec.family} gives no logits, so it cannot generate. Load a decoder.")
                cache = out.cache if use_cache else None
                token = out.logits[:, -1].argmax(-1).to(self.device)
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

    def _inputs(self, batch: TokenBatch, logits_to_keep: int) -> dict[str, Any]:
        cache = {} if self._spec.encoder else {"use_cache": False}
        return self._named_inputs(batch.ids, batch.mask, batch.positions, logits_to_keep) | cache

    def _named_inputs(self, ids: Tensor, mask: Tensor, positions: Tensor, logits_to_keep: int) -> dict[str, Any]:
        """What the forward pass is called with; families with ALiBi read positions from the mask."""
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
        if "position_ids" not in self._takes:
            del inputs["position_ids"]
        if logits_to_keep and "logits_to_keep" in self._takes:
            return inputs | {"logits_to_keep": logits_to_keep}
        return inputs

    def _below(self, batch: TokenBatch, layer: int, writes: EditMap) -> tuple[TokenBatch, Site, Pass]:
        """What a prefix starts with: the batch on its device, the site it ends at, and a pass with its edits."""
        entry = Site(layer, "resid_pre").resolve(self._spec.n_layers)
        state = self._state((), writes, False, None)
        if above := sorted(site.short for site in state.writes if site.layer >= entry.layer):
            raise SiteError(
                f"Edits at {', '.join(above)} lie above a prefix of layer {entry.layer}. Give them to run()."
            )
        batch = batch.to(self.device)
        state.enter(EditContext(batch, batch.positions, batch.mask))
        return batch, entry, state

    def _state(self, reads: Collection[Site], writes: EditMap, grad: bool, stop_after: Site | None) -> Pass:
        n_layers = self._spec.n_layers
        # composed, since -1 and the last layer are one site
        resolved = compose(*({site.resolve(n_layers): edit} for site, edit in writes.items()))
        wanted = frozenset(site.resolve(n_layers) for site in reads)
        stop = None if stop_after is None else stop_after.resolve(n_layers)
        for site in (*wanted, *resolved, *([stop] if stop else [])):
            self._require(site)
        if fixed := sorted(site.short for site in resolved if site.stream in READ_ONLY):
            raise UnsupportedSite(
                f"An edit at {', '.join(fixed)} was asked for, but attention patterns can only be read. Edit z."
            )
        if stop is not None:
            resolved = {site: edit for site, edit in resolved.items() if site.order <= stop.order}
        needed = needed_sites(resolved)
        for site in needed:
            self._require(site)
        return Pass(wanted, resolved, self._spec.n_heads, stop, grad, needed=needed)

    def _as_asked(self, reads: Collection[Site], state: Pass) -> dict[Site, Tensor]:
        """What was read, in forward order, by the very sites the caller named (-1 stays -1)."""
        resolved = {site: site.resolve(self._spec.n_layers) for site in reads}
        return {site: state.captured[resolved[site]] for site in sorted(resolved, key=lambda s: resolved[s].order)}

    def _require(self, site: Site) -> None:
        reason = self._spec.unsupported.get(site.stream)
        layer = site.resolve(self._spec.n_layers).layer
        if reason is None and site.stream == "mlp_post" and self._mlp_widths[layer] is None:
            reason = FUSED
        if site.stream == "pattern" and not self._forms_patterns:
            raise UnsupportedSite(NO_PATTERN.format(layer=layer))
        if reason is not None:
            raise UnsupportedSite(f"{site.short} was asked for, but {self._spec.family} does not have it: {reason}")
        if site.head is not None and not 0 <= site.head < self._spec.n_heads:
            raise SiteError(f"{site.short} was asked for, but the model has heads 0 to {self._spec.n_heads - 1}.")

    def _require_eval(self) -> None:
        if self.hf.training:
            raise BackendError("The model is in training mode, where dropout makes passes differ. Call model.eval().")

    def _require_above(self, state: Pass, layer: int) -> None:
        asked = {*state.reads, *state.writes, *state.needed} | ({state.stop_after} if state.stop_after else set())
        if below := sorted((site for site in asked if site.layer < layer), key=lambda site: site.order):
            names = ", ".join(site.short for site in below)
            raise SiteError(
                f"Asked for, but never fired: {names}. The pass starts above, at a prefix of layer {layer}."
            )

    def _require_fired(self, state: Pass) -> None:
        stop = {state.stop_after} if state.stop_after else set[Site]()
        missing = sorted({*state.reads, *state.writes, *state.needed, *stop} - state.fired, key=lambda site: site.order)
        if missing:
            names = ", ".join(site.short for site in missing)
            raise SiteError(
                f"These sites were asked for but never fired: {names}. The pass stopped before them, or the model "
                "skipped their block."
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


@final
@dataclass(frozen=True, eq=False)
class Output:
    """What a model's forward pass gave: logits [batch, kept, d_vocab] and the key-value cache, where there are any."""

    logits: Tensor | None
    cache: Any = None

    def kept(self, count: int) -> Tensor | None:
        """The logits of the last `count` positions; all for 0. Some families unembed more than they are asked."""
        return self.logits if self.logits is None or not count else self.logits[:, -count:]


@final
@dataclass(frozen=True, eq=False)
class Given:
    """An edit that puts a kept state in the place of what came."""

    hidden: Float[Tensor, "batch pos d_model"]

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        return self.hidden.to(x)
