"""Activation patching at every layer and token: which single states carry what tells two prompts apart.

Each prompt has a partner. In the run of one (the base) a single token's state at a single site is replaced by its
partner's (the source), and a metric of the last token's logits is read. `denoise` runs the corrupt prompt and restores
clean states; `noise` runs the clean prompt and corrupts them (Heimersheim & Nanda 2024, arXiv:2404.15255).

The results are those of one whole pass a cell, from far fewer operations: see `patch_cells`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.errors import ConfigError, ShapeError
from subspace_probe.core.keys import content_key
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import Site, Stream, stream
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.interventions.alignment import Aligned, Mode, align
from subspace_probe.interventions.patch_cells import Cells, climb, exchanged, rerun
from subspace_probe.interventions.sweep_results import PatchSweep
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.climbing import Records
from subspace_probe.models.hooked import HookedModel, PromptsLike

STATES = 2**26
"""So many numbers of patched states are held at a time (256 MB in float32)."""


@runtime_checkable
class ReadsTokens(Protocol):
    """A metric that reads few logits and says which, so that the others need not be computed: they are NaN then."""

    def tokens(self, prompts: Sequence[Prompt]) -> Int[Tensor, "n k"]:
        """The tokens whose logits it reads of each prompt."""
        ...


def patch_sweep(
    model: HookedModel,
    clean: PromptsLike,
    corrupt: PromptsLike,
    metric: str | Metric,
    *,
    streams: Sequence[Stream] = ("resid_pre",),
    layers: Sequence[int] | None = None,
    positions: Sequence[Where | int | str] | None = None,
    heads: bool = False,
    mode: Mode = "denoise",
    subspace: Subspace | None = None,
    skip_equal: bool = False,
    batch_tokens: int = 4096,
    progress: bool = False,
    seed: int = 0,
) -> PatchSweep:
    """Exchange the state of every stream, layer and token, one at a time.

    Args:
        clean: prompts; their `answer` and `foil` are what metrics ask for in every run.
        corrupt: one partner each, in the same order.
        metric: a name from `METRICS`, or a callable from last-token logits and the clean prompts to one number each.
        streams: which; `resid_pre[l + 1]` and `resid_post[l]` are one tensor.
        layers: which blocks; all by default.
        positions: one token each, such as `[T_INST, LAST, at(-3)]`; by default every token, where all prompts are
            equally long.
        heads: exchange each head of `z` alone; needs `streams=("z",)`.
        mode: "denoise" puts clean states into the corrupt run, "noise" the reverse.
        subspace: exchange only the component inside it.
        skip_equal: do not run cells whose states are equal bit for bit; their value is the base's, exactly.
        batch_tokens: how many tokens a block may run on at a time. Lower it when memory is short.
        progress: show a bar.
        seed: of the intervals in the report.

    Returns:
        Values per cell and prompt, equal to those of whole passes up to rounding.

    Raises:
        DataError, PositionError, ConfigError: prompts without partners, lengths that differ without `positions`,
            settings that do not go together, a metric that is the same for both sides.
        StaleStore: a subspace of another model.
        SiteError, ShapeError: a stream the family does not have; a subspace of another width; a metric that does not
            give one number a prompt.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} was given. Give at least 1.")
    aligned = align(model, clean, corrupt, positions, mode)
    grid = Grid.of(model, streams, layers, heads)
    if subspace is not None:
        grid.require(model, subspace)
    work = _Work(model, aligned, grid, metric_for(metric, model), subspace, skip_equal, batch_tokens)
    with (
        torch.no_grad(),
        tqdm(total=work.values.numel(), desc="patch sweep", unit="run", disable=not progress, leave=False) as bar,
    ):
        for rows in aligned.parts(max(1, batch_tokens // 8)):
            work.do(rows)
            bar.update(work.computed + work.skipped - bar.n)
    n = len(aligned.prompts)
    shape = (len(grid.streams), len(grid.layers), len(aligned.positions), *((grid.heads,) if heads else ()), n)
    source, base = work.ends
    config = {"positions": aligned.positions, "layers": grid.layers, "streams": grid.streams, "heads": heads}
    config |= {"subspace": None if subspace is None else repr(subspace), "skip_equal": skip_equal}
    swept = PatchSweep(
        values=work.values.view(shape),
        clean=source if mode == "denoise" else base,
        corrupt=base if mode == "denoise" else source,
        streams=grid.streams,
        layers=grid.layers,
        positions=aligned.positions,
        texts=aligned.texts,
        mode=mode,
        metric=name_of(metric),
        groups=aligned.groups,
        computed=work.computed,
        skipped=work.skipped,
        engine="climbing" if work.climbed else "passes",
        notes={**origin(model, aligned, subspace), "config": config},
        seed=seed,
    )
    swept.require_gap()
    return swept


def origin(model: HookedModel, aligned: Aligned, subspace: Subspace | None) -> dict[str, str]:
    """What was exchanged in which model: names and content keys, by which `agreement` compares."""
    inside = "none" if subspace is None else f"{subspace!r}, key {content_key([subspace.basis])[:12]}"
    given = {"model": model.spec.name, "fingerprint": model.fingerprint, "data": aligned.data}
    return given | {"prompts": aligned.key, "subspace": inside}


@final
@dataclass(frozen=True)
class Grid:
    """The sites of a sweep: streams x layers x heads, in this order.

    Attributes:
        heads: how many there are of each, 1 where whole streams are meant.
    """

    streams: tuple[Stream, ...]
    layers: tuple[int, ...]
    heads: int
    sites: tuple[Site, ...]

    @classmethod
    def of(cls, model: HookedModel, streams: Sequence[Stream], layers: Sequence[int] | None, heads: bool) -> "Grid":
        """Check what was asked for, and resolve negative layers."""
        if isinstance(streams, str) or not streams:
            raise ConfigError(f"streams={streams!r} was given. Give a sequence, such as ('resid_pre', 'mlp_out').")
        named: list[Stream] = [stream(name) for name in streams]
        if heads and named != ["z"]:
            raise ConfigError(f"heads=True was given with {', '.join(named)}, but only z has heads: streams=('z',).")
        n_layers = model.spec.n_layers
        chosen = tuple(Site(layer).resolve(n_layers).layer for layer in (range(n_layers) if layers is None else layers))
        if not chosen or len(set(chosen)) < len(chosen) or len(set(named)) < len(named):
            raise ConfigError(
                f"Layers {chosen} of {', '.join(named)} were asked for. Name each once, and at least one."
            )
        which: Sequence[int | None] = range(model.spec.n_heads) if heads else (None,)
        sites = tuple(Site(layer, name, head) for name in named for layer in chosen for head in which)
        for site in sites:
            model.backend.width(site)  # raises where the family does not have it
        return cls(tuple(named), chosen, len(which), sites)

    def require(self, model: HookedModel, subspace: Subspace) -> None:
        """Check that states of these sites can be exchanged within a subspace.

        Raises:
            ConfigError: a subspace with a reader of its own.
            ShapeError: another width.
            StaleStore: a subspace of another model.
        """
        subspace.require_projection("exchanged along its basis alone")
        for site in self.sites:
            subspace.require_width(model.backend.width(site), site)
        if subspace.fingerprint is not None:
            subspace.require_model(model.fingerprint)


@final
class _Work:
    """A sweep while it is computed.

    Attributes:
        values: shape [stream, layer, position, head, n].
        ends: the metric of sources and of bases, shape [n] each.
    """

    def __init__(
        self,
        model: HookedModel,
        aligned: Aligned,
        grid: Grid,
        metric: Metric,
        subspace: Subspace | None,
        skip_equal: bool,
        batch_tokens: int,
    ) -> None:
        self.model, self.aligned, self.grid, self.metric = model, aligned, grid, metric
        self.subspace, self.skip_equal, self.batch_tokens = subspace, skip_equal, batch_tokens
        n = len(aligned.prompts)
        shape = (len(grid.streams), len(grid.layers), len(aligned.positions), grid.heads, n)
        self.values = torch.full(shape, float("nan"), dtype=torch.float64)
        self.ends = torch.full((2, n), float("nan"), dtype=torch.float64)
        self.computed = self.skipped = 0
        self.climbed = True

    def do(self, rows: list[int]) -> None:
        """All cells of some prompts."""
        model, sites = self.model, self.grid.sites
        batches = [batch.rows(rows).to(model.backend.device) for batch in (self.aligned.source, self.aligned.base)]
        recorder = model.backend if isinstance(model.backend, Records) and not model.standing_sites else None
        recording = recorder.record(batches[1]) if recorder is not None else None
        whole = _last_logits(model, batches[1]) if recording is None else recording.logits
        self.ends[1, rows] = self.measured(whole, None, rows)
        tokens = self._tokens(whole, rows)
        if recorder is None or recording is None:
            self.climbed = False
            run = model.run(batches[0], reads=sites, logits_to_keep=1)
            self.ends[0, rows] = self.measured(_given(run.logits)[:, -1], None, rows)
        else:
            last = Site(-1)
            run = model.run(batches[0], reads={*sites, last}, stop_after=last)
            self.ends[0, rows] = self.measured(recorder.unembed(run.reads[last][:, -1], tokens), tokens, rows)
        differ = self.subspace is not None or self.skip_equal
        base = model.run(batches[1], reads=sites, stop_after=max(sites, key=lambda s: s.order)).reads if differ else {}

        def emit(logits: Tensor, places: Tensor) -> None:
            shown: list[int] = (places % self.values.shape[-1]).tolist()
            self.values.view(-1)[places] = self.measured(logits, tokens, shown)

        for cells in self._cells(rows, run.reads, base, batches):
            if recorder is not None and recording is not None:
                climb(model, recorder, recording, cells, tokens, self.batch_tokens, emit)
            else:
                rerun(model, batches[1], cells, tokens, self.batch_tokens, emit)

    def measured(self, logits: Float[Tensor, "row token"], tokens: Tensor | None, rows: list[int]) -> Tensor:
        """The metric of last-token logits; with `tokens`, these are the only ones there are."""
        found = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()
        if tokens is not None:
            found = torch.full((len(rows), self.model.spec.d_vocab), float("nan"), dtype=found.dtype).index_copy(
                1, tokens.cpu(), found
            )
        values = self.metric(found, [self.aligned.prompts[row] for row in rows])
        if values.shape != (len(rows),):
            raise ShapeError(
                f"The metric gave shape {tuple(values.shape)} for {len(rows)} prompts. Give one number each."
            )
        return values.detach().to("cpu", torch.float64)

    def _tokens(self, logits: Tensor, rows: list[int]) -> Int[Tensor, " token"] | None:
        """The tokens that the metric reads; None where it does not say, or where they are many."""
        if not isinstance(self.metric, ReadsTokens):
            return None
        tokens = self.metric.tokens([self.aligned.prompts[row] for row in rows]).unique().to(logits.device)
        if len(tokens) > self.model.spec.d_vocab // 4:
            return None
        if not torch.equal(self.measured(logits[:, tokens], tokens, rows), self.ends[1, rows]):
            raise ConfigError(
                f"The metric {name_of(self.metric)} reads other tokens than its `tokens` says. Name all that it reads."
            )
        return tokens

    def _cells(
        self, rows: list[int], source: Mapping[Site, Tensor], base: Mapping[Site, Tensor], batches: Sequence[TokenBatch]
    ) -> Iterator[list[Cells]]:
        """The cells of some prompts, as many at a time as memory allows."""
        aligned, sites, n = self.aligned, self.grid.sites, len(rows)
        columns = aligned.base_at[:, rows].cpu()
        from_columns = aligned.source_at[:, rows].cpu()
        places = torch.arange(self.values.numel()).view(*self.values.shape[:2], -1, *self.values.shape[3:])
        places = places.movedim(2, 3).flatten(0, 2)[..., rows]  # [site, position, n]
        width = max(model_width for model_width in (source[site].shape[-1] for site in sites))
        per = max(1, STATES // (len(sites) * n * width))
        prompts = torch.arange(n).expand(len(columns), n)
        for start in range(0, len(columns), per):
            some = slice(start, start + per)
            apart = _collide(columns[some])
            blocks = [slice(i, i + 1) for i in range(start, min(start + per, len(columns)))] if apart else [some]
            found = [
                self._exchanged(site, prompts[at], columns[at], from_columns[at], places[i, at], source, base)
                for i, site in enumerate(sites)
                for at in blocks
            ]
            if kept := [cells for cells in found if len(cells)]:
                yield kept

    def _exchanged(
        self,
        site: Site,
        prompts: Tensor,
        columns: Tensor,
        from_columns: Tensor,
        places: Tensor,
        source: Mapping[Site, Tensor],
        base: Mapping[Site, Tensor],
    ) -> Cells:
        """The states that one site gets."""
        prompts, columns, places = prompts.flatten(), columns.flatten(), places.flatten()
        states = source[site][prompts, from_columns.flatten()]
        kept = torch.ones_like(prompts, dtype=torch.bool)
        if site in base:
            own = base[site][prompts, columns]
            if self.skip_equal:
                kept = (states != own).any(-1).cpu()
                self.values.view(-1)[places[~kept]] = self.ends[1].expand_as(self.values).reshape(-1)[places[~kept]]
            states = exchanged(own, states, self.subspace)
        self.computed += int(kept.sum())
        self.skipped += int((~kept).sum())
        return Cells(site, prompts, columns, states, places)[kept]


def _last_logits(model: HookedModel, batch: TokenBatch) -> Float[Tensor, "n d_vocab"]:
    return _given(model.run(batch, logits_to_keep=1).logits)[:, -1]


def _given(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise RuntimeError("a pass that was not stopped gave no logits")
    return logits


def _collide(columns: Int[Tensor, "position n"]) -> bool:
    """Whether two of the positions are one token in some prompt."""
    return any(len(column.unique()) < len(column) for column in columns.T)
