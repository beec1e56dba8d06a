"""Many conditions on the same prompts, in few passes.

Conditions are stacked on the batch axis and edited slice-wise; whatever lies below the lowest edited site is computed
once for all of them (`Prefix`).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.edits import Edit, EditMap, Stacked, needed_sites, needs_of
from subspace_probe.core.errors import ConfigError, ShapeError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Intervention, Metric, require_scopes
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import TokenBatch, Where
from subspace_probe.models.hooked import HookedModel

Condition = Intervention | None
"""An intervention, or nothing: the clean run."""


def outcomes(
    model: HookedModel,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
    name: str = "conditions",
) -> Float[Tensor, "metric condition n"]:
    """Every metric of every prompt under every condition, shape [metric, condition, n].

    Args:
        batch_tokens: how many tokens, pads included and conditions counted, one pass may have.
    """

    def reduce(logits: Tensor, rows: list[int]) -> Tensor:
        shown = [prompts[row] for row in rows]
        values = [metric(logits, shown) for metric in metrics]
        if wrong := [tuple(value.shape) for value in values if value.shape != (len(rows),)]:
            raise ShapeError(f"A metric gave shape {wrong[0]} for {len(rows)} prompts. It must give one number each.")
        return torch.stack([value.double() for value in values])

    shape = (len(metrics), len(conditions), len(prompts))
    return _map(model, prompts, conditions, reduce, shape, batch_tokens, progress, name)


def condition_logits(
    model: HookedModel, prompts: Sequence[Prompt], conditions: Sequence[Condition], *, batch_tokens: int = 4096
) -> Float[Tensor, "condition n d_vocab"]:
    """Last-token logits under every condition; for few conditions, since nothing is reduced: `outcomes` keeps numbers.

    Returns:
        [condition, n, d_vocab] float32.
    """

    def keep(logits: Tensor, rows: list[int]) -> Tensor:
        return logits.T  # vocabulary in front, as metrics are

    shape = (model.spec.d_vocab, len(conditions), len(prompts))
    out = _map(model, prompts, conditions, keep, shape, batch_tokens, False, "", dtype=torch.float32)
    return out.permute(1, 2, 0)


def _map(
    model: HookedModel,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    reduce: Callable[[Tensor, list[int]], Tensor],
    shape: tuple[int, int, int],
    batch_tokens: int,
    progress: bool,
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    n_layers = model.spec.n_layers
    if model.spec.encoder:
        raise ConfigError(f"{model.spec.family} is an encoder and has no next-token logits. Use a decoder model.")
    for condition in conditions:
        if condition:
            model.check(condition)
    taken = model.standing_sites
    maps = [_hoisted(condition.edits(n_layers), n_layers, taken) if condition else {} for condition in conditions]
    batch = model.tokens(prompts)
    require_scopes(batch, [condition for condition in conditions if condition])
    order = sorted(range(batch.size), key=lambda row: int(batch.lengths[row]))
    out = torch.full(shape, float("nan"), dtype=dtype)
    bar: Callable[..., Any] = tqdm
    with bar(total=batch.size * len(conditions), desc=name, unit="run", disable=not progress, leave=False) as shown:
        for layer, wheres, members in _alike(model, conditions, maps):
            for rows in _chunks(order, batch.lengths.tolist(), batch_tokens // min(8, len(members))):
                part = batch.rows(rows)
                prefix = model.prefix(part, layer, column=_first_column(part, wheres))
                rerun = prefix.hidden.shape[0] * prefix.hidden.shape[1]
                # kept keys and values are copied for every condition, so they bound a pass as well
                per_pass = max(1, min(batch_tokens // rerun, 8 * batch_tokens // part.ids.numel()))
                for start in range(0, len(members), per_pass):
                    some = members[start : start + per_pass]
                    stacked = prefix.repeat(len(some))
                    writes = _stack([maps[i] for i in some], prefix.batch)
                    logits = model.run(stacked.batch, writes=writes, prefix=stacked, logits_to_keep=1).logits
                    if logits is None:
                        raise RuntimeError("a pass that was not stopped gave no logits")
                    for copy, values in zip(some, logits[:, -1].float().cpu().split(len(rows)), strict=True):
                        out[:, copy, rows] = reduce(values, rows).to(out.dtype)
                    shown.update(len(rows) * len(some))
    return out


def _alike(
    model: HookedModel, conditions: Sequence[Condition], maps: Sequence[EditMap]
) -> list[tuple[int, frozenset[Where], list[int]]]:
    """Conditions that begin at the same layer and tokens, so that those that begin late share a late prefix.

    Clean runs, which may begin anywhere, go with those that begin last.
    """
    found: dict[tuple[int, frozenset[Where]], list[int]] = {}
    clean: list[int] = []
    for i, (condition, edits) in enumerate(zip(conditions, maps, strict=True)):
        if condition is None:
            clean.append(i)
            continue
        needs = frozenset[tuple[Site, Where]]().union(*(needs_of(edit) for edit in edits.values()))
        touched = {*edits, *(site for site, _ in needs)} | model.standing_needs
        lowest = min((site.layer for site in touched), default=model.spec.n_layers - 1)
        wheres = frozenset({condition.where, *(where for _, where in needs)})
        found.setdefault((lowest, wheres), []).append(i)
    if clean:
        latest = max(found, key=lambda key: key[0], default=(model.spec.n_layers - 1, frozenset[Where]()))
        found.setdefault(latest, []).extend(clean)
    return [(layer, wheres, members) for (layer, wheres), members in found.items()]


def _chunks(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Prompts of similar length together, few where there are many conditions, of which a pass then holds many."""
    chunks: list[list[int]] = [[]]
    for row in order:
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[row] > max(1, budget):
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def _first_column(batch: TokenBatch, wheres: Collection[Where]) -> int:
    """The first column that any condition edits or depends on; nothing before it can change."""
    last = batch.ids.shape[1] - 1
    touched = [batch.select(where, batch.positions) & batch.mask for where in wheres]
    return min((int(edited.any(0).nonzero()[0]) for edited in touched if bool(edited.any())), default=last)


def _hoisted(edits: EditMap, n_layers: int, taken: frozenset[Site]) -> EditMap:
    """Edits of resid_post[l] moved to resid_pre[l + 1], the same tensor, so that block l need not run again."""
    moved: dict[Site, Edit] = {}
    needed = needed_sites(edits)
    for site, edit in edits.items():
        target = site.lifted(n_layers)
        if target != site and (target in edits or target in taken or site in needed):
            return edits  # both names of one tensor are used, here or by the model: leave their order alone
        moved[target] = edit
    return moved


def _stack(maps: Sequence[EditMap], batch: TokenBatch) -> EditMap:
    sites = {site for edits in maps for site in edits}
    return {site: Stacked([edits.get(site) for edits in maps], batch) for site in sites}
