"""Attribution patching: the first-order map of a patching sweep, from gradients instead of passes.

The effect of exchanging a state is read off the gradient at the base, (source - base) . dmetric/dstate: all layers and
tokens of a stream from one backward pass (Nanda 2023; Syed, Rager & Conmy 2023, arXiv:2310.10348). Where the metric is
curved between base and source this is wrong; `integrated` averages the gradient along the straight path between them
(integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365; used so by Hanna et al. 2024, arXiv:2403.17806), one
layer's whole state moving at a time. How good the map is says `agreement` with an exact sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.edits import EditContext
from subspace_probe.core.errors import ConfigError, PositionError
from subspace_probe.core.findings import Finding
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric, Prefix
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.interventions.alignment import Aligned, Mode, align
from subspace_probe.interventions.gradients import summed
from subspace_probe.interventions.patch_cells import exchanged
from subspace_probe.interventions.patch_sweep import Grid, origin
from subspace_probe.interventions.sweep_results import PatchSweep
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel, PromptsLike


@final
@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated changes of a metric under the exchange of every cell's state, per prompt.

    Attributes:
        values: patched minus base, as estimated; the axes of `PatchSweep.values`.
        streams, layers, positions, mode, metric: as in the sweep.
        steps: gradients averaged along the path; 0 for the one at the base.
        notes: model, prompts and subspace, as in the sweep.
    """

    values: Float64[Tensor, "stream layer *cell n"]
    streams: tuple[Stream, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    mode: str
    metric: str
    steps: int
    notes: dict[str, str]


@final
@dataclass(frozen=True)
class Agreement:
    """How well an attribution orders and predicts the effects of an exact sweep.

    Attributes:
        pearson: correlation over cells of effects averaged over prompts; NaN where either is constant.
        spearman: the same of ranks.
        cells: how many.
        steps: of the attribution.
    """

    pearson: float
    spearman: float
    cells: int
    steps: int

    def findings(self) -> tuple[Finding, ...]:
        """Both as findings, unaudited; cells of one prompt depend on each other, so they carry no interval."""
        kind = f"integrated over {self.steps} steps" if self.steps else "at the base"
        note = f"over {self.cells} cells, gradients {kind}"
        return tuple(
            Finding(f"attribution.{name}", f"attribution follows the exact sweep ({name})", value, note=note)
            for name, value in (("pearson", self.pearson), ("spearman", self.spearman))
        )


def attribution(
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
    integrated: int = 0,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Attribution:
    """Estimate a patching sweep from gradients; arguments as of `patch_sweep`.

    Args:
        metric: differentiable.
        integrated: average so many gradients along the way from base to source, the midpoints of equal steps, while
            all positions of one layer move together; 0 takes the gradient at the base, for all layers at once. With
            many steps the estimates of one layer add up to the effect of exchanging all its positions at once.

    Raises:
        ConfigError: a metric without a gradient, negative steps, a subspace with a reader of its own.
        ShapeError, StaleStore: a subspace of another width or model.
        PositionError: with `integrated`, two positions that are one token in some prompt.
    """
    if integrated < 0 or batch_tokens < 1:
        raise ConfigError(f"integrated={integrated} with batch_tokens={batch_tokens} was asked for. Give 0 or more.")
    aligned, grid = align(model, clean, corrupt, positions, mode), Grid.of(model, streams, layers, heads)
    if subspace is not None:
        grid.require(model, subspace)
    n = len(aligned.prompts)
    shape = (len(grid.streams), len(grid.layers), len(aligned.positions), *((grid.heads,) if heads else ()), n)
    values = torch.full((len(grid.streams) * len(grid.layers), *shape[2:]), float("nan"), dtype=torch.float64)
    judge = metric_for(metric, model)
    with tqdm(total=n, desc="attribution", unit="prompt", disable=not progress, leave=False) as bar:
        for rows in aligned.parts(max(1, batch_tokens // 8)):
            pairs = _Pairs(model, aligned, rows, judge, integrated, batch_tokens)
            for i, found in enumerate(pairs.estimates(grid, subspace, heads=heads)):
                values[i][..., rows] = found
            bar.update(len(rows))
    return Attribution(
        values.view(shape),
        grid.streams,
        grid.layers,
        aligned.positions,
        mode,
        name_of(metric),
        integrated,
        origin(model, aligned, subspace),
    )


def agreement(sweep: PatchSweep, estimate: Attribution) -> Agreement:
    """Correlate an attribution with the exact sweep of the same cells.

    Raises:
        ConfigError: they are of different cells, modes, metrics, models, prompts or subspaces.
    """
    for name in ("streams", "layers", "positions", "mode", "metric"):
        exact, estimated = getattr(sweep, name), getattr(estimate, name)
        if exact != estimated:
            raise ConfigError(f"The sweep's {name} are {exact}, the attribution's {estimated}. Compare the same cells.")
    if sweep.values.shape != estimate.values.shape:
        raise ConfigError(
            f"The sweep has shape {tuple(sweep.values.shape)}, the attribution {tuple(estimate.values.shape)}. Ask for "
            "heads in both or in neither, and give both the same prompts."
        )
    for name in ("fingerprint", "prompts", "subspace"):
        exact, estimated = sweep.notes.get(name), estimate.notes.get(name)
        if exact != estimated:
            raise ConfigError(
                f"The sweep and the attribution are of different things: {name} {exact} and {estimated}. Give both "
                "the same model, the same prompts in the same order, and the same subspace."
            )
    exact = (sweep.values - sweep.base).mean(-1).flatten()
    estimated = estimate.values.mean(-1).flatten()
    if len(exact) < 2 or float(exact.std()) == 0.0 or float(estimated.std()) == 0.0:
        return Agreement(float("nan"), float("nan"), len(exact), estimate.steps)
    pearson = float(torch.corrcoef(torch.stack([exact, estimated]))[0, 1])
    ranks = [torch.from_numpy(stats.rankdata(values.numpy())) for values in (exact, estimated)]
    spearman = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    return Agreement(pearson, spearman, len(exact), estimate.steps)


@final
class _Probe:
    """Adds nothing to a site's states, perhaps after moving some, and keeps the nothing: what is differentiated by.

    Args:
        columns: of the batch of the pass, shape [cell].
        rows: of the batch, shape [cell].
        states: put there first; None to leave the states alone.
    """

    def __init__(self, rows: Tensor, columns: Tensor, states: Tensor | None = None) -> None:
        self.rows, self.columns, self.states = rows, columns, states
        self.added: Tensor | None = None

    def __call__(self, x: Float[Tensor, "batch pos d"], ctx: EditContext) -> Float[Tensor, "batch pos d"]:
        first = ctx.batch.ids.shape[1] - x.shape[1]  # a continued pass begins at a later column
        places = self.rows.to(x.device), (self.columns - first).to(x.device)
        if self.states is not None:
            x = x.index_put(places, self.states.to(x))
        self.added = torch.zeros(len(self.rows), x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
        return x.index_put(places, self.added, accumulate=True)


@final
class _Pairs:
    """Pairs of prompts of one length, and the tokens of them that are exchanged."""

    def __init__(
        self, model: HookedModel, aligned: Aligned, rows: list[int], metric: Metric, steps: int, batch_tokens: int
    ) -> None:
        device = model.backend.device
        self.model, self.metric, self.steps, self.batch_tokens = model, metric, steps, batch_tokens
        self.prompts = [aligned.prompts[row] for row in rows]
        self.base, self.source = aligned.base.rows(rows).to(device), aligned.source.rows(rows).to(device)
        self.columns, self.from_columns = aligned.base_at[:, rows], aligned.source_at[:, rows]
        self.at = torch.arange(len(rows)).expand_as(self.columns)
        if steps and any(len(column.unique()) < len(column) for column in self.columns.T):
            raise PositionError("Two of the positions are one token in some prompt, and cannot move together.")

    def estimates(self, grid: Grid, subspace: Subspace | None, *, heads: bool) -> list[Tensor]:
        """Estimated changes of every stream and layer, shape [position(, head), n] each."""
        sites = [Site(layer, name) for name in grid.streams for layer in grid.layers]
        own, new = (
            {site: states[self.at, columns] for site, states in self.model.run(batch, reads=sites).reads.items()}
            for batch, columns in ((self.base, self.columns), (self.source, self.from_columns))
        )

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (grid.heads, -1)) if heads else states

        moves = {site: exchanged(split(own[site]), split(new[site]), subspace) - split(own[site]) for site in sites}
        if self.steps:
            gradients = {site: self._along(site, own[site], moves[site].reshape(own[site].shape)) for site in sites}
        else:
            gradients = self._at_base(sites)
        found = [(moves[site].double() * split(gradients[site]).double()).sum(-1) for site in sites]
        return [(one.movedim(1, -1) if heads else one).cpu() for one in found]

    def _at_base(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Gradients at every site from one pass, shape [position, n, width] each."""
        probes = {site: _Probe(self.at.flatten(), self.columns.flatten()) for site in sites}
        gradients = self._differentiated(self.base, None, self.prompts, probes)
        return {site: gradient.view(*self.columns.shape, -1) for site, gradient in gradients.items()}

    def _along(self, site: Site, own: Tensor, move: Tensor) -> Tensor:
        """The mean gradient on the way of all positions of one site together, shape [position, n, width]."""
        n, target = self.base.size, site.lifted(self.model.spec.n_layers, self.model.standing_sites)
        prefix = self.model.prefix(self.base, target.layer, column=int(self.columns.min()))
        at_once = max(1, self.batch_tokens // (n * prefix.hidden.shape[1]))
        total = torch.zeros_like(own)
        for start in range(0, self.steps, at_once):
            count = min(at_once, self.steps - start)
            along = (torch.arange(start, start + count, device=own.device, dtype=own.dtype) + 0.5) / self.steps
            states = own + along[:, None, None, None] * move
            rows = self.at + n * torch.arange(count)[:, None, None]
            columns = self.columns.expand(rows.shape)
            probe = _Probe(rows.flatten(), columns.flatten(), states.flatten(0, 2))
            stacked = prefix.repeat(count)
            found = self._differentiated(stacked.batch, stacked, self.prompts * count, {target: probe})[target]
            total = total + found.view(states.shape).sum(0)
        return total / self.steps

    def _differentiated(
        self, batch: TokenBatch, prefix: Prefix | None, prompts: Sequence[Prompt], probes: dict[Site, _Probe]
    ) -> dict[Site, Tensor]:
        """Gradients by what the probes added; prompts do not see each other, so one backward pass serves all."""
        logits = self.model.run(batch, writes=probes, prefix=prefix, logits_to_keep=1, grad=True).logits
        if logits is None:
            raise RuntimeError("a pass that was not stopped gave no logits")
        total = summed(self.metric, logits, prompts)
        added = [probe.added for probe in probes.values() if probe.added is not None]
        # behind the last block only the last token's state is read
        found = torch.autograd.grad(total, added, allow_unused=True, materialize_grads=True)
        return dict(zip(probes, found, strict=True))
