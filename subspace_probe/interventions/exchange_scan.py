"""Where a variable can be exchanged as such: states of another prompt, of the same question or of another one.

An exchange within a question (the same prompt under the other value of the variable) also succeeds where the state
already holds the answer. With a source of another question the answer would be a wrong one, so success means that the
state carries the variable and not yet what follows from it. Minder et al. 2024 (arXiv:2411.07404) use both.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast, components
from subspace_probe.core.errors import DataError, SiteError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.metrics import metric_for
from subspace_probe.models.hooked import HookedModel


def source_rows(contrast: Contrast, *, another: bool, seed: int = 0) -> Int[Tensor, " n"]:
    """For every prompt the row of a source with the other label.

    Args:
        another: of another question, drawn at random among those that share neither pair nor group with the prompt;
            else the prompt's partner in its pair.
        seed: of the draw.

    Raises:
        DataError: a prompt without such a source.
    """
    labels = torch.tensor(contrast.labels)
    unit = torch.tensor(components(contrast.pairs, contrast.groups) if another else contrast.pairs)
    fits = (labels[:, None] != labels) & ((unit[:, None] != unit) if another else (unit[:, None] == unit))
    if bare := (~fits.any(1)).nonzero().flatten().tolist():
        where = "another question" if another else "their own pair"
        raise DataError(
            f"{len(bare)} of {len(contrast)} prompts of {contrast.name!r} have no partner of the other label in "
            f"{where} (rows {', '.join(map(str, bare[:5]))}). Give every question under both labels."
        )
    chance = torch.rand(fits.shape, generator=torch.Generator().manual_seed(seed))
    return (chance * fits).argmax(1)


def turned(contrast: Contrast) -> tuple[Prompt, ...]:
    """The prompts as they should be answered under the other label: `answer` and `foil` exchanged.

    Raises:
        DataError: a prompt without a foil.
    """
    if missing := [row for row, prompt in enumerate(contrast.prompts) if not prompt.answer or not prompt.foil]:
        raise DataError(
            f"{len(missing)} prompts of {contrast.name!r} do not say what they answer under either label (rows "
            f"{', '.join(map(str, missing[:5]))}). Give each its 'answer' and, as 'foil', its partner's."
        )
    return tuple(replace(prompt, answer=prompt.foil, foil=prompt.answer) for prompt in contrast.prompts)


def exchange_scan(
    model: HookedModel,
    contrast: Contrast,
    sources: Int[Tensor, " n"],
    positions: Sequence[Where],
    *,
    layers: Sequence[int] | None = None,
    metric: str | Metric = "accuracy",
) -> Float64[Tensor, "layer position n"]:
    """Exchange the whole state behind every layer at every position, one at a time, with that of each prompt's source.

    Args:
        contrast: prompts with `answer` and `foil`; all are run.
        sources: a row for each, as `source_rows` gives them.
        positions: one token each, the same in prompt and source.
        layers: whose outputs (`resid_post`); all by default.
        metric: asked for the answers of the *other* label: an accuracy of 1 means that the exchange turned the answer
            to what the source's label makes right for the prompt itself.

    Returns:
        The metric of every prompt, shape [layer, position, n].

    Raises:
        DataError, PositionError: prompts without foils, or without such a token.
    """
    chosen = range(model.spec.n_layers) if layers is None else layers
    sites = [Site(layer).resolve(model.spec.n_layers) for layer in chosen]
    prompts, judge = turned(contrast), metric_for(metric, model)
    patches: dict[Site, list[Condition]] = {site: [] for site in sites}
    for where in positions:
        acts = model.capture(contrast, sites=sites, where=where)
        for site in sites:
            patches[site].append(_patch(acts, site, sources, where))
    # a layer at a time: what lies below it is computed once for all positions
    return torch.stack([outcomes(model, prompts, patches[site], [judge])[0] for site in sites])


def exchange_within(
    model: HookedModel,
    contrast: Contrast,
    sources: Int[Tensor, " n"],
    subspaces: Sequence[Subspace],
    *,
    where: Where = LAST,
    metric: str | Metric = "accuracy",
) -> Float64[Tensor, "subspace n"]:
    """The same within subspaces, one at a time, each at the site it was found at: interchange accuracy.

    Raises:
        SiteError: a subspace that does not say where it was found.
    """
    by_site: dict[Site, list[int]] = {}
    for row, subspace in enumerate(subspaces):
        if subspace.site is None:
            raise SiteError("A subspace does not say where it was found. Give it a site: subspace.moved(Site(3)).")
        by_site.setdefault(subspace.site.resolve(model.spec.n_layers), []).append(row)
    prompts, judge = turned(contrast), metric_for(metric, model)
    acts = model.capture(contrast, sites=list(by_site), where=where)
    found = torch.full((len(subspaces), len(contrast)), float("nan"), dtype=torch.float64)
    for site, rows in by_site.items():
        patch = _patch(acts, site, sources, where)
        found[rows] = outcomes(model, prompts, [patch.with_subspace(subspaces[row]) for row in rows], [judge])[0]
    return found


def _patch(acts: Activations, site: Site, sources: Int[Tensor, " n"], where: Where) -> Patch:
    n = len(sources)
    return Patch(Source({site: acts.at(site)[sources]}, torch.arange(n), where, n), where)
