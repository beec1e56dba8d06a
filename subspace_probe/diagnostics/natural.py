"""What the model itself does at one site: pairs of prompts between which a variable differs, each a base in turn.

Whether a subspace is what the model uses can only be asked of states that the model itself brings about. So the checks
on mechanism put into each prompt what its partner has at the site, or a part of it, whatever the intervention does.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, PositionError
from subspace_probe.core.findings import Interval
from subspace_probe.core.intervals import mean_of, shares
from subspace_probe.core.protocols import Metric
from subspace_probe.core.sites import RESIDUAL, Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import LAST, PROMPT, T_INST, Where
from subspace_probe.diagnostics.read_space import ReadSpace, path_read_space, weight_read_space
from subspace_probe.interventions.conditions import outcomes
from subspace_probe.interventions.gradients import metric_gradients
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.sources import Source
from subspace_probe.models.hooked import HookedModel

PATH = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where between base and source gradients are taken: at the base alone, a saturated metric has none."""


@final
class Natural:
    """Pairs of prompts whose variable differs, with their states at one site.

    The first half of `prompts` are the negative sides, the second half their positive partners; either half is patched
    with the states of the other.

    Args:
        model: whose states they are.
        contrast: minimal pairs; label 0 or 1 is the value of the variable.
        site: where.
        where: which tokens; as many in both prompts of a pair.
        metric: of the last token's logits, and of each prompt alone.
        pairs: at most so many are used.

    Raises:
        DataError: no complete pair, or one only; pairs that differ in how many tokens they have there; a metric that
            does not tell their sides apart.
        ConfigError: fewer than two pairs asked for.
        PositionError: prompts without such a token.
    """

    def __init__(
        self,
        model: HookedModel,
        contrast: Contrast,
        site: Site,
        where: Where,
        metric: Metric,
        *,
        pairs: int = 64,
        batch_tokens: int = 4096,
    ) -> None:
        if pairs < 2:
            raise ConfigError(f"pairs={pairs} was given. Natural pairs must be at least two, better thirty.")
        positive, negative = _different(contrast).first_pairs(pairs).sides()
        if len(positive) < 2:
            raise DataError(f"{contrast.name!r} has one complete pair only. Give at least two, better thirty.")
        self.model, self.where, self.metric = model, where, metric
        self.site = site.resolve(model.spec.n_layers)
        self.prompts = _joined(negative, positive)
        self._residual = dict[int, Sequence[tuple[Site, Where, Patch]]]()
        self.labels: Int[Tensor, " n"] = torch.tensor(self.prompts.labels)
        acts = model.capture(self.prompts, sites=[self.site], where=where)
        self.prompt: Int[Tensor, " rows"] = acts.prompt.cpu()
        self.base: Float[Tensor, "rows d"] = acts.at(self.site).float().cpu()
        self.partner = partner_rows(self.prompt, len(self.prompts), where)
        self.source: Float[Tensor, "rows d"] = self.base[self.partner]
        self.clean: Float[Tensor, " n"] = outcomes(
            model, self.prompts.prompts, [None], [metric], batch_tokens=batch_tokens
        )[0, 0]
        self._require_gap(contrast.name)

    def _require_gap(self, name: str) -> None:
        half = len(self.clean) // 2
        gaps = self.clean[half:] - self.clean[:half]
        mean, interval = mean_of(gaps, self.prompts.groups[:half], seed=0)
        # of one group there is no interval, and then the pairs must agree
        apart = (
            interval.low > 0 or interval.high < 0 or (interval.low != interval.low and bool((gaps * mean > 0).all()))
        )
        if not bool(gaps.isfinite().all()) or not apart:
            raise DataError(
                f"The metric does not tell the two sides of the pairs of {name!r} apart: positive minus negative is "
                f"{mean:.3g} on average, from {interval.low:.3g} to {interval.high:.3g}. Check that partners differ in "
                "the variable, that labels are right, and that the metric measures what the variable decides."
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def difference(self) -> Float[Tensor, "rows d"]:
        """Source minus base."""
        return self.source - self.base

    @property
    def wanted(self) -> Float[Tensor, " n"]:
        """The metric of each prompt's partner: what a whole exchange of all that matters would give."""
        return self.clean.roll(len(self.clean) // 2)

    @property
    def row_labels(self) -> Int[Tensor, " rows"]:
        """The label of each row's prompt."""
        return self.labels[self.prompt]

    @property
    def gap(self) -> float:
        """Mean difference of the metric between positive and negative prompts."""
        half = len(self.clean) // 2
        return float((self.clean[half:] - self.clean[:half]).mean())

    def put(self, states: Float[Tensor, "rows d"]) -> Patch:
        """The bases with these states in the place of their own."""
        source = Source({self.site: states}, self.prompt, self.where, len(self))
        return Patch(source, self.where)

    def moved(self, change: Float[Tensor, "rows d"]) -> Patch:
        """The bases with their states moved so far."""
        return self.put(self.base + change)

    def within(self, subspace: Subspace) -> Float[Tensor, "rows d"]:
        """What exchanging the component in a subspace moves."""
        return (subspace.project(self.source.double()) - subspace.project(self.base.double())).float()

    def along(self, basis: Float[Tensor, "k d"] | None) -> Float[Tensor, "rows d"]:
        """What exchanging the component in the span of orthonormal rows moves; nothing for none."""
        if basis is None:
            return torch.zeros_like(self.base)
        return (self.difference.double() @ basis.double().T @ basis.double()).float()

    @cached_property
    def containers(self) -> Sequence[tuple[str, Patch]]:
        """Exchanges of the site's whole state, of the residual stream behind it at its tokens, and at all tokens."""
        site = self.site
        found = [(f"whole {site.short}", self.moved(self.difference))]
        stream = site if site.stream in RESIDUAL else Site(site.layer, "resid_post")
        if stream != site:
            found.append((f"{stream.short} at {self.where}", self.exchanged([stream], self.where)[0]))
        lengths = self.model.tokens(self.prompts.prompts).lengths
        half = len(lengths) // 2
        if bool((lengths[:half] == lengths[half:]).all()):
            found.append((f"{stream.short} at all tokens", self.exchanged([stream], PROMPT)[0]))
        return found

    def exchanged(self, sites: Sequence[Site], where: Where) -> list[Patch]:
        """Whole states of other sites, or of other tokens, exchanged between the partners; one patch a site.

        Raises:
            DataError: partners that differ in how many tokens they have there.
            PositionError: prompts without such a token.
        """
        acts = self.model.capture(self.prompts, sites=list(sites), where=where)
        prompt = acts.prompt.cpu()
        rows = partner_rows(prompt, len(self), where)
        return [
            Patch(Source({site: acts.at(site).float().cpu()[rows]}, prompt, where, len(self)), where) for site in sites
        ]

    def residual(self, layers: int) -> Sequence[tuple[Site, Where, Patch]]:
        """Whole residual states of some layers, at the site's tokens and at the last ones; as `exchanged`.

        Positions at which partners do not match are left out.
        """
        if layers not in self._residual:
            n_layers, found = self.model.spec.n_layers, list[tuple[Site, Where, Patch]]()
            count = min(layers, n_layers)
            sites = [Site(k) for k in sorted({round(i * (n_layers - 1) / max(1, count - 1)) for i in range(count)})]
            wheres: list[Where] = [self.where, LAST] + ([T_INST] if self.model.chats else [])
            for where in dict.fromkeys(wheres):
                try:
                    patches = self.exchanged(sites, where)
                except (DataError, PositionError):
                    continue
                found += [(site, where, patch) for site, patch in zip(sites, patches, strict=True)]
            self._residual[layers] = found
        return self._residual[layers]

    def shares(self, values: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Share of the difference between the partners that was brought about: 0 nothing, 1 all, more overshoots.

        Per prompt, such that the mean is the ratio of means (Makelov et al. 2023, FLDD), and the spread its own.
        """
        sign = torch.where(self.labels == 1, -1.0, 1.0).to(values)
        return shares((values - self.clean) * sign, (self.wanted - self.clean) * sign)

    def flips(self, values: Float[Tensor, "... n"]) -> Bool[Tensor, "... n"]:
        """Whether a prompt's metric has come nearer to its partner's than to its own: interchange accuracy of two."""
        towards = (self.wanted - self.clean).sign()
        return (values - (self.wanted + self.clean) / 2) * towards > 0

    def share_of(self, values: Float[Tensor, " n"], *, seed: int) -> tuple[float, Interval]:
        """Mean share with its interval by group."""
        return mean_of(self.shares(values), self.prompts.groups, seed=seed)

    def rate_of(self, flipped: Tensor, *, seed: int) -> tuple[float, Interval]:
        """Mean of a number per prompt (a rate, a difference of rates) with its interval by group."""
        return mean_of(flipped.double(), self.prompts.groups, seed=seed)

    @cached_property
    def gradients(self) -> Float[Tensor, "rows d"]:
        """Of the metric at the bases, signed towards the partner, in units of the mean gap."""
        return self._gradients(None)

    def _gradients(self, states: Tensor | None) -> Tensor:
        found = metric_gradients(
            self.model, self.prompts.prompts, self.site, self.where, self.metric, states=states
        ).float()
        sign = torch.where(self.row_labels == 1, -1.0, 1.0)
        return found * sign[:, None] / self.gap

    @cached_property
    def path_gradients(self) -> Float[Tensor, "rows d"]:
        """As `gradients`, the mean over five states from base to source."""
        return self._along.mean(0)

    @cached_property
    def _along(self) -> Float[Tensor, "step rows d"]:
        return torch.stack([self._gradients(self.base + t * self.difference) for t in PATH])

    @cached_property
    def read_space(self) -> ReadSpace:
        """What reads the site: the weights behind `mlp_post` and `z`, elsewhere gradients of the metric."""
        if self.site.stream in ("mlp_post", "z"):
            return weight_read_space(self.model.backend, self.site)
        return path_read_space(self._along.flatten(0, 1))


def partner_rows(prompt: Int[Tensor, " rows"], n: int, where: Where) -> Int[Tensor, " rows"]:
    """The row of each row's partner, where the second half of `n` prompts are the partners of the first.

    Raises:
        DataError: pairs with different numbers of rows.
    """
    counts = torch.bincount(prompt, minlength=n)
    half = n // 2
    unequal = (counts[:half] != counts[half:]).nonzero().flatten().tolist()
    if unequal or not len(prompt):
        raise DataError(
            f"{len(unequal)} of {half} pairs have different numbers of tokens at {str(where)!r}, so their states "
            "cannot be exchanged one by one. Choose one token, such as LAST or T_INST."
        )
    return torch.arange(len(prompt)).roll(len(prompt) // 2)


def _different(contrast: Contrast) -> Contrast:
    """Without pairs that are copies of earlier ones: they are no further evidence."""
    sides: dict[int, list[str]] = {}
    for pair, prompt, label in zip(contrast.pairs, contrast.prompts, contrast.labels, strict=True):
        sides.setdefault(pair, []).append(f"{label} {prompt!r}")
    first: dict[tuple[str, ...], int] = {}
    for pair, shown in sides.items():
        first.setdefault(tuple(sorted(shown)), pair)
    kept = set(first.values())
    return contrast.take([row for row, pair in enumerate(contrast.pairs) if pair in kept])


def _joined(negative: Contrast, positive: Contrast) -> Contrast:
    return replace(
        negative,
        prompts=negative.prompts + positive.prompts,
        labels=negative.labels + positive.labels,
        pairs=negative.pairs + positive.pairs,
        groups=negative.groups + positive.groups,
        factors={name: column + positive.factors[name] for name, column in negative.factors.items()},
    )
