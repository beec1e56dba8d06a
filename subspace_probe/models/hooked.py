"""The model that users call: prompts in, activations, logits and texts out."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.activations import Activations
from subspace_probe.core.captures import Memory, Plan, Sink
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.edits import NO_EDITS, EditMap, compose, needed_sites
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Intervention, ModelSpec, Prefix, Run, Step, require_scopes, touches
from subspace_probe.core.reports import installed_versions
from subspace_probe.core.sites import Site, SitesLike, resolve_sites
from subspace_probe.core.tokens import LAST, TokenBatch, Where
from subspace_probe.models.backend import Backend
from subspace_probe.models.capturing import Limits, Windows, batches, planned, record
from subspace_probe.models.chat import encode, has_template

IN_MEMORY = Memory()

PromptsLike = str | Prompt | Contrast | Sequence[str] | Sequence[Prompt]


def as_prompts(prompts: PromptsLike) -> tuple[Prompt, ...]:
    """What users write, as a tuple of prompts."""
    if isinstance(prompts, Contrast):
        return prompts.prompts
    listed: Sequence[str | Prompt] = [prompts] if isinstance(prompts, str | Prompt) else prompts
    return tuple(Prompt(text=item) if isinstance(item, str) else item for item in listed)


@final
class HookedModel:
    """A language model whose activations can be read and edited.

    Args:
        backend: runs the passes.
        tokenizer: a fast Hugging Face tokenizer; only read.
        template_kwargs: options of the chat template, such as `enable_thinking=False`.
        words: words that stand for behaviours ("refusal", "harmful", ...), from the model directory's metadata.
        directory: where the model was loaded from, if it was a folder.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        words: Mapping[str, Sequence[str]] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.words: dict[str, tuple[str, ...]] = {key: tuple(value) for key, value in (words or {}).items()}
        self.directory = directory
        self._standing: tuple[Intervention, ...] = ()
        self._standing_edits: EditMap = NO_EDITS
        self._first_tokens: dict[str, int] = {}  # metrics ask for the same few words again and again

    @property
    def spec(self) -> ModelSpec:
        """What the model is: layers, widths, context."""
        return self.backend.spec

    @property
    def chats(self) -> bool:
        """Whether prompts go through a chat template, and so have T_INST and T_POST_INST."""
        return has_template(self.tokenizer) and not self.spec.encoder

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, the adapters that act, the configuration, the vocabulary and the chat template.

        Weights are hashed on use and again once they have been replaced or written to; writes through `.data` are seen
        by the next capture into a folder.
        """
        return content_key([self.backend.weights_key(), self._language])

    @property
    def _language(self) -> str:
        template = getattr(self.tokenizer, "chat_template", None)
        return content_key([self._vocabulary, repr(template), repr(sorted(self.template_kwargs.items()))])

    @cached_property
    def _vocabulary(self) -> str:
        return content_key(self.tokenizer.get_vocab())

    def provenance(self, contrast: Contrast) -> dict[str, str]:
        """What results say about this model and these prompts: names, hashes, revision, versions."""
        revision = getattr(self.backend.hf.config, "_commit_hash", None)
        return {
            "model": self.spec.name,
            "fingerprint": self.fingerprint,
            "data": contrast.name,
            "data_hash": contrast.key,
            "versions": ", ".join(f"{name} {number}" for name, number in installed_versions().items()),
            **({"revision": revision} if revision else {}),
        }

    def tokens(self, prompts: PromptsLike) -> TokenBatch:
        """Tokenise, left-padded.

        Raises:
            DataError: prompts longer than the context.
        """
        return encode(
            self.tokenizer, as_prompts(prompts), template_kwargs=self.template_kwargs, context=self.spec.context
        )

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
        """One forward pass, some sites read, some edited: the primitive under everything. See `Backend.run`."""
        lowest = prefix.layer if prefix else 0  # standing edits below a prefix are already in it
        standing = {site: edit for site, edit in self._standing_edits.items() if site.layer >= lowest}
        return self.backend.run(
            batch,
            reads=reads,
            writes=compose(standing, writes),
            grad=grad,
            stop_after=stop_after,
            logits_to_keep=logits_to_keep,
            prefix=prefix,
            where=where,
            dtype=dtype,
        )

    def prefix(self, batch: TokenBatch, layer: int, *, column: int = 0) -> Prefix:
        """The state in front of a block, and from a token on, to continue passes from. See `Backend.prefix`."""
        below = {site: edit for site, edit in self._standing_edits.items() if site.layer < layer}
        if len(below) < len(self._standing_edits):
            column = 0  # standing edits above may touch any token
        return self.backend.prefix(batch, layer, column=column, writes=below)

    def capture(
        self,
        prompts: PromptsLike,
        *,
        sites: SitesLike = "resid_post",
        where: Where | str = LAST,
        interventions: Sequence[Intervention] = (),
        into: Sink = IN_MEMORY,
        dtype: torch.dtype | None = None,
        batch_tokens: int = 8192,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Activations:
        """Activations of the tokens asked for, in one visit to the model.

        The pass ends at the deepest site, and only the selected tokens are kept.

        Args:
            prompts: texts, prompts or a contrast; without labels all are 0.
            sites: for instance `resid_post()` for every layer, `Site(3)`, or `"L3.attn_out"`.
            where: which tokens. One token a prompt gives one row a prompt; `ALL` gives one row a token.
            interventions: active while reading.
            into: where the rows go: `Memory()`, `Memory("cuda")`, or `Folder("acts")`, which needs memory for one part
                of the rows only and is not computed twice.
            dtype: of the rows; the model's own by default.
            batch_tokens: how many tokens, pads included, a batch may have. Lower it when memory is short.
            batch_size: at most so many prompts a batch.

        Returns:
            Activations; `acts.at(site)` has shape [n, width].

        Raises:
            SiteError, PositionError, DataError: what was asked for does not exist.
        """
        _require_kinds(where, into, dtype)
        shown = as_prompts(prompts)
        contrast = prompts if isinstance(prompts, Contrast) else Contrast("prompts", shown, (0,) * len(shown))
        windows, limits = Windows(self.tokens, shown), Limits(batch_tokens, batch_size)
        chosen = resolve_sites(sites, self.spec.n_layers)
        asked = Where.parse(where) if isinstance(where, str) else where
        edits, kept = self._edits(interventions), dtype or self.backend.dtype
        if not isinstance(into, Memory):
            self.backend.weights_key(anew=True)  # what is kept on disk must be of the weights as they are now
        for edit in interventions:
            if not any(touches(windows[i], edit) for i in range(len(windows))):
                require_scopes(windows[0], [edit])
        plan = self._plan(contrast, chosen, asked, kept, interventions, windows, limits)

        def run(batch: TokenBatch) -> Run:
            return self.run(batch, reads=chosen, writes=edits, stop_after=chosen[-1], where=asked, dtype=kept)

        return record(plan, windows, run, into, limits, progress=progress)

    def _plan(
        self,
        contrast: Contrast,
        sites: tuple[Site, ...],
        where: Where,
        dtype: torch.dtype,
        interventions: Sequence[Intervention],
        windows: Windows,
        limits: Limits,
    ) -> Plan:
        widths = {site: self.backend.width(site) for site in sites}
        prompt, position, parts = planned(windows, where, sum(widths.values()) * dtype.itemsize, limits)
        notes = self.provenance(contrast)
        depends = {
            "model": notes["fingerprint"],
            "prompts": contrast.prompts,
            "tokens": windows.keys,
            "sites": ", ".join(site.short for site in sites),
            "positions": str(where),
            "dtype": str(dtype).removeprefix("torch."),
            "interventions": (*self._standing, *interventions),
        }
        made = {
            "backend": type(self.backend).__name__,
            "attention": self.backend.attention,
            "batch_tokens": str(limits.tokens),
            "batch_size": str(limits.prompts or ""),
        }
        return Plan(contrast, where, widths, dtype, prompt, position, parts, depends, notes, made)

    def logits(
        self,
        prompts: PromptsLike,
        *,
        interventions: Sequence[Intervention] = (),
        batch_tokens: int = 8192,
        progress: bool = False,
    ) -> Float[Tensor, "n d_vocab"]:
        """Last-token logits, shape [n, d_vocab], in the order of the prompts, on the CPU.

        Raises:
            ConfigError: an encoder, which has no next token.
        """
        if self.spec.encoder:
            raise ConfigError(f"{self.spec.family} is an encoder and has no next-token logits. Use a decoder model.")
        batch, edits = self.tokens(prompts), self._edits(interventions)
        require_scopes(batch, interventions)
        out = torch.empty(batch.size, self.spec.d_vocab, dtype=torch.float32)
        for rows in _shown(batch, batch_tokens, progress, "logits"):
            logits = self.run(batch.rows(rows), writes=edits, logits_to_keep=1).logits
            assert logits is not None  # noqa: S101  (nothing stopped the pass)
            out[rows] = logits[:, -1].float().cpu()
        return out

    def generate(
        self,
        prompts: PromptsLike,
        *,
        interventions: Sequence[Intervention] = (),
        max_new_tokens: int = 32,
        use_cache: bool = True,
        reads: Collection[Site] = (),
        on_step: Callable[[Sequence[int], Step], Sequence[bool]] | None = None,
        batch_tokens: int = 8192,
        progress: bool = False,
    ) -> list[str]:
        """Greedy continuations under interventions, as texts without special tokens.

        Args:
            reads: sites given to `on_step`, from the very pass that produced the token.
            on_step: called after every step of a batch with the numbers of its prompts; a False ends that answer.

        Raises:
            ConfigError: an encoder, or prompt and answer longer than the context.
        """
        batch, edits = self.tokens(prompts), compose(self._standing_edits, self._edits(interventions))
        require_scopes(batch, interventions, new=max_new_tokens)
        texts = [""] * batch.size
        for rows in _shown(batch, batch_tokens, progress, "generate"):
            made = self.backend.generate(
                batch.rows(rows),
                reads=reads,
                writes=edits,
                max_new_tokens=max_new_tokens,
                use_cache=use_cache,
                on_step=None if on_step is None else partial(on_step, rows),
            )
            for row, ids, length in zip(rows, made.ids.cpu(), made.lengths.tolist(), strict=True):
                texts[row] = self.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        return texts

    def named(self, name: str) -> "HookedModel":
        """The same model under another name in reports."""
        return self._copy(self.backend.named(name), self._standing)

    @contextmanager
    def intervened(self, *interventions: Intervention) -> Generator["HookedModel"]:
        """The same model with interventions standing: every call on it is edited. This one is left as it is."""
        yield self._copy(self.backend, (*self._standing, *interventions))

    def token_ids(self, words: Sequence[str]) -> list[int]:
        """The first token of each word as an answer would begin with it.

        Behind a chat template a reply begins without a leading space, elsewhere with one where the tokenizer has it.

        Raises:
            ConfigError: a word the tokenizer has no token for.
        """
        lead = "" if self.chats else " "
        return [self._first_token(lead + word.strip()) for word in words]

    def _first_token(self, text: str) -> int:
        if text not in self._first_tokens:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and not self.tokenizer.decode(ids[:1]).strip():
                ids = ids[1:]  # SentencePiece may give the leading space a token of its own
            if not ids or ids[0] == self.tokenizer.unk_token_id:
                raise ConfigError(f"The tokenizer has no token for {text.strip()!r}. Choose a word that it knows.")
            self._first_tokens[text] = int(ids[0])
        return self._first_tokens[text]

    def behaviour_ids(self, behaviour: str) -> list[int]:
        """Tokens that stand for a behaviour, such as "refusal" or "harmful".

        Raises:
            ConfigError: the model directory does not say which.
        """
        if behaviour not in self.words:
            raise ConfigError(
                f"Which words stand for {behaviour!r} is not known for {self.spec.name}. Pass them "
                f"(--words {behaviour}=Sorry,I), or put them in subspace_probe.json in the model's folder: "
                f'{{"words": {{"{behaviour}": ["Sorry"]}}}}.'
            )
        return self.token_ids(self.words[behaviour])

    def _copy(self, backend: Backend, standing: tuple[Intervention, ...]) -> "HookedModel":
        model = HookedModel(
            backend, self.tokenizer, template_kwargs=self.template_kwargs, words=self.words, directory=self.directory
        )
        model._standing, model._standing_edits = standing, self._edits(standing)
        return model

    @property
    def standing_sites(self) -> frozenset[Site]:
        """Sites that `intervened` edits in every pass of this model."""
        return frozenset(self._standing_edits)

    @property
    def standing_needs(self) -> frozenset[Site]:
        """Sites whose states standing interventions depend on, so that no pass may begin above them."""
        return needed_sites(self._standing_edits)

    def check(self, intervention: Intervention) -> None:
        """Check that what an intervention was made from fits its sites and comes from this very model.

        Raises:
            ShapeError: another width.
            StaleStore: another model; `for_any_model()` of a subspace or source lifts the check.
        """
        if not isinstance(intervention.where, Where):
            raise ConfigError(f"where={intervention.where!r} was given. Give a position such as LAST or at(3).")
        for site, part in intervention.parts(self.spec.n_layers):
            if part.fingerprint is not None:
                part.require_model(self.fingerprint)
            part.require_width(self.backend.width(site), site)

    def _edits(self, interventions: Sequence[Intervention]) -> EditMap:
        for intervention in interventions:
            self.check(intervention)
        return compose(*(intervention.edits(self.spec.n_layers) for intervention in interventions))

    def __repr__(self) -> str:
        spec = self.spec
        return f"HookedModel({spec.name}: {spec.family}, {spec.n_layers} layers, d_model {spec.d_model})"


def _require_kinds(where: object, into: object, dtype: object) -> None:
    if not isinstance(where, Where | str):
        raise ConfigError(f"where={where!r} was given. Give a position such as LAST, at(3) or 'last'.")
    if not isinstance(into, Sink):
        raise ConfigError(f"into={into!r} was given. Give a place for rows: Memory(), or Folder({str(into)!r}).")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} was given. Give a floating one, such as torch.bfloat16.")


def _shown(batch: TokenBatch, budget: int, progress: bool, name: str) -> Iterator[list[int]]:
    """Batches under a budget of tokens, with a progress bar."""
    with tqdm(total=batch.size, desc=name, unit="prompt", disable=not progress, leave=False) as bar:
        for rows in batches(batch.lengths.tolist(), Limits(budget)):
            yield rows
            bar.update(len(rows))
