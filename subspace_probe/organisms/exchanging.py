"""What answers do when states are exchanged within minimal pairs: plain forward hooks, for certificates.

Deliberately not the package's own interventions: what labels a test case must not share code with what is tested on it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import DataError, UnsupportedSite
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.models.hooked import HookedModel

_AT: Final[Mapping[str, tuple[str, bool]]] = {
    "resid_post": ("", False),
    "mlp_out": ("mlp", False),
    "mlp_in": ("mlp", True),
    "mlp_post": ("mlp.down_proj", True),
}
"""Stream to the module of a block that holds it, and whether it is that module's input. `mlp_in` is no site of its own:
it is the normed state that the MLP is shown."""
CHUNK: Final = 128


@final
class Exchange:
    """The prompts of complete minimal pairs, each of which is given its partner's state.

    Args:
        model: a Llama-shaped organism. Its Hugging Face module is run; the package's backends are not.
        contrast: minimal pairs with answers; prompts without a partner of the other label are left out.
        where: one token a prompt.

    Attributes:
        labels: of the prompts, shape [n]; the two of a pair stand side by side.
        logits: at the last token, clean, shape [n, d_vocab].

    Raises:
        DataError: no complete pair, or prompts without an answer.
        PositionError: a prompt without that token.
    """

    def __init__(self, model: HookedModel, contrast: Contrast, where: Where) -> None:
        rows = _side_by_side(contrast)
        prompts = [contrast.prompts[row] for row in rows]
        missing = [prompt.shown for prompt in prompts if not prompt.answer]
        if missing:
            raise DataError(f"{len(missing)} prompts of {contrast.name!r} have no answer, as {missing[0]!r}. Give one.")
        words = sorted({str(prompt.answer) for prompt in prompts})
        ids = dict(zip(words, model.token_ids(words), strict=True))
        self.hf: Any = model.backend.hf
        self.labels: Int[Tensor, " n"] = torch.tensor([contrast.labels[row] for row in rows])
        self.answers: Int[Tensor, " n"] = torch.tensor([ids[str(prompt.answer)] for prompt in prompts])
        self.partner: Int[Tensor, " n"] = torch.arange(len(rows)) ^ 1
        self.tokens = model.tokens(prompts)
        self.where = where
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._kept: list[tuple[Tensor, TokenBatch, Any, int]] = []
        self.logits: Float[Tensor, "n d_vocab"] = self._clean()

    @property
    def moving(self) -> Bool[Tensor, " n"]:
        """Prompts that answer otherwise than their partner does, shape [n]: on these an exchange is judged."""
        return self.answers != self.answers[self.partner]

    @torch.no_grad()
    def answered_by(self, model: HookedModel, n: int) -> Float[Tensor, "some d_vocab"]:
        """Last-token logits of another model with the same tokenizer, on the first `n` of the prompts, clean."""
        return _last(model.backend.hf, self.tokens.rows(slice(0, n)))

    def states(self, stream: str, layer: int) -> Float[Tensor, "n d"]:
        """Clean states at the token, shape [n, d]; `stream` is resid_post, mlp_out, mlp_in or mlp_post."""
        return self._seen[stream, layer]

    def right(self) -> float:
        """Share of prompts answered right when nothing is exchanged."""
        return float((self.logits.argmax(-1) == self.answers).double().mean())

    def flips(self, site: Site, basis: Float[Tensor, "k d"] | None = None) -> float:
        """Interchange accuracy: the likeliest token of the whole vocabulary is the partner's answer.

        Args:
            site: where a state is replaced by the partner's.
            basis: orthonormal rows, to exchange the component in their span alone; the whole state by default.

        Raises:
            UnsupportedSite: a stream that is not read here.
        """
        if site.stream not in _AT or site.stream == "mlp_in":
            raise UnsupportedSite(f"{site.short} is not exchanged by certificates. Use resid_post, mlp_out, mlp_post.")
        own = self._seen[site.stream, site.layer]
        delta = own[self.partner] - own
        if basis is not None:
            rows = basis.to(torch.float64)
            delta = ((delta.double() @ rows.T) @ rows).to(own.dtype)
        hits = self._answers(site, delta) == self.answers[self.partner]
        return float(hits[self.moving].double().mean())

    @torch.no_grad()
    def _answers(self, site: Site, delta: Tensor) -> Tensor:
        """Likeliest last token with a move added to one site at the token: tokens before it are not run again."""
        out: list[Tensor] = []
        for rows, part, cache, first in self._kept:
            at = torch.arange(len(rows)), self._columns(rows, part) - first
            with _hooked(self._module(site.stream, site.layer), _adding(at, delta[rows])):
                out.append(_last(self.hf, part, first, cache).argmax(-1))
            cache.crop(first - part.ids.shape[1])
        return torch.cat(out)

    @torch.no_grad()
    def _clean(self) -> Tensor:
        """Last-token logits; states at the token, and keys and values of the tokens before it, are kept."""
        from transformers import DynamicCache

        out: list[Tensor] = []
        seen: dict[tuple[str, int], list[Tensor]] = {}
        for rows in torch.arange(len(self.labels)).split(CHUNK):
            part = self.tokens.rows(rows.tolist())
            columns, cache = self._columns(rows, part), DynamicCache()
            with ExitStack() as stack:
                for stream in _AT:
                    for layer in range(len(self.hf.model.layers)):
                        kept = _keeping((torch.arange(len(rows)), columns), seen.setdefault((stream, layer), []))
                        stack.enter_context(_hooked(self._module(stream, layer), kept))
                out.append(_last(self.hf, part, 0, cache))
            first = int(columns.min())
            cache.crop(first - part.ids.shape[1])
            self._kept.append((rows, part, cache, first))
        self._seen = {key: torch.cat(parts) for key, parts in seen.items()}
        return torch.cat(out)

    def _columns(self, rows: Tensor, part: TokenBatch) -> Tensor:
        return part.ids.shape[1] - part.lengths + part.position(self.where)

    def _module(self, stream: str, layer: int) -> tuple[nn.Module, bool]:
        path, before = _AT[stream]
        block: nn.Module = self.hf.model.layers[layer]
        return block.get_submodule(path), before


def oriented(
    vector: Float[Tensor, " d"],
    states: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    model: HookedModel,
    site: Site,
    where: Where,
    finder: str,
) -> Subspace:
    """The direction of a vector; its scale is the gap between the class means along it, its sign towards label 1."""
    means = torch.stack([states[labels == label].double().mean(0) for label in (0, 1)])
    unit = vector.double() / vector.double().norm()
    gap = float((means[1] - means[0]) @ unit)
    notes = {"finder": finder, "model": model.spec.name, "fingerprint": model.fingerprint}
    origin = means.mean(0).float()
    found = Subspace.span(unit if gap >= 0 else -unit, origin=origin, site=site, where=where, notes=notes)
    return replace(found, scale=torch.tensor([abs(gap)]))


def _last(hf: Any, batch: TokenBatch, first: int = 0, cache: Any = None) -> Float[Tensor, "n d_vocab"]:
    """Last-token logits of the columns from `first` on, behind those that a cache holds."""
    return hf(
        input_ids=batch.ids[:, first:], attention_mask=batch.mask.long(), position_ids=batch.positions[:, first:],
        past_key_values=cache, use_cache=cache is not None, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip


def _side_by_side(contrast: Contrast) -> list[int]:
    """Rows of complete pairs, label 0 before label 1."""
    found: dict[int, dict[int, int]] = {}
    for row, (pair, label) in enumerate(zip(contrast.pairs, contrast.labels, strict=True)):
        found.setdefault(pair, {}).setdefault(label, row)
    rows = [sides[label] for sides in found.values() if len(sides) == 2 for label in (0, 1)]
    if not rows:
        raise DataError(f"No pair of {contrast.name!r} has both labels, so that nothing can be exchanged. Give pairs.")
    return rows


def _adding(at: tuple[Tensor, Tensor], delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_put(at, x[at] + delta)


def _keeping(at: tuple[Tensor, Tensor], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(x: Tensor) -> Tensor:
        kept.append(x[at])
        return x

    return keep


@contextmanager
def _hooked(place: tuple[nn.Module, bool], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a module's input or output while the block runs."""
    module, before = place

    def on_input(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (change(inputs[0]), *inputs[1:])

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(on_input) if before else module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
