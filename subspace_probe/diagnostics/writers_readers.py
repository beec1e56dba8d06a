"""Who writes it, and who reads it?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.sites import RESIDUAL, Site
from subspace_probe.core.tokens import LAST
from subspace_probe.diagnostics.cases import Case, CaseCheck, Line, Prompts
from subspace_probe.diagnostics.natural import Natural, partner_rows
from subspace_probe.interventions.conditions import Condition, outcomes
from subspace_probe.interventions.path_patch import path_patch


@final
@dataclass(frozen=True)
class WritersReaders(CaseCheck):
    """Which components write the coordinate's difference, and through which the exchange reaches the metric directly.

    Writers, of the residual stream: the share of component j in what the exchange moves, sum of (P D) . D_j over sum of
    |P D|^2, with D_j the difference of its own output; the shares of all components and of the embedding add up to 1.
    Readers: the exchange within the subspace, path-patched (Wang et al. 2022, arXiv:2211.00593) to one attention or MLP
    behind the site at the last token, or to the last residual state, all components between held as they were.

    Estimate: the part of the exchange's effect that the three largest direct paths bring about. Null: none; paths may
    add up to more or less than the whole. Faithful: a short list of both, whose paths reproduce the effect (name movers
    and S-inhibition heads, in the published case); of an illusory one at an MLP the components below have no share in
    what acts. Supported from one half on, else inconclusive; never decides. Applies to every intervention with a
    subspace, and lists writers in the residual stream alone. Cannot see paths over several components, nor over tokens
    between the site's and the last.
    """

    name: ClassVar[str] = "writers_readers"
    line: ClassVar[Line] = "mechanism"
    question: ClassVar[str] = "Which components write it, and which read it?"
    on: ClassVar[Prompts] = "natural"

    most: int = 12

    def missing(self, case: Case) -> str:
        """Needs an orthogonal subspace and something behind the site."""
        if case.whole or case.natural is None:
            return case.whole or case.no_natural
        try:
            case.subspace.require_projection("sent along its basis alone")
        except ConfigError as error:
            return str(error)
        return "" if self._receivers(case.natural) else "no component lies behind the site."

    def conditions(self, case: Case) -> Sequence[Condition]:
        """The exchange itself."""
        return [case.pairs.moved(case.pairs.within(case.subspace))]

    def passes(self, case: Case) -> int:
        """A pair of passes for each path, its outcome, and the writers."""
        return (3 * len(self._receivers(case.pairs)) + 2) * len(case.pairs)

    def read(self, case: Case, values: Float[Tensor, "condition n"]) -> Sequence[Finding]:
        """Both lists."""
        pairs = case.pairs
        whole = float(pairs.shares(values[0]).mean())
        written, read = writers(pairs, pairs.within(case.subspace)), self._read_by(case)
        top = sorted(read.items(), key=lambda item: -abs(item[1]))[:3]
        estimate = sum(share for _, share in top) / whole if abs(whole) > 0.05 else float("nan")
        by = sorted(written.items(), key=lambda item: -abs(item[1]))[:4]
        wrote = ", ".join(f"{name} {share:.0%}" for name, share in by) or "not listed: it is no residual state"
        reads = ", ".join(f"{name} {share:.0%}" for name, share in top)
        note = f"written by {wrote}; the exchange moves {whole:.0%} of the difference, directly through {reads}"
        claim = "a few components read it, and carry the effect"
        verdict = "supported" if estimate >= 0.5 else "inconclusive"
        return [Finding("mechanism.writers_readers", claim, estimate, None, None, len(pairs), verdict, note=note)]

    def _receivers(self, pairs: Natural) -> list[Site]:
        n_layers, unsupported = pairs.model.spec.n_layers, pairs.model.spec.unsupported
        start = pairs.site.lifted(n_layers)
        found = [Site(layer, name) for layer in range(start.layer, n_layers) for name in ("attn_out", "mlp_out")]
        own = {"z": "attn_out", "mlp_post": "mlp_out"}.get(pairs.site.stream)
        behind = [s for s in found if s.order > start.order and s.stream not in unsupported]
        behind = [s for s in behind if (s.layer, s.stream) != (start.layer, own)]
        if "resid_mid" in unsupported and start.stream in ("z", "attn_out"):  # attention and MLP read the same state
            behind = [s for s in behind if s.layer > start.layer]
        end = Site(n_layers - 1, "resid_post")
        return behind[: self.most] + ([end] if start.order < end.order else [])

    def _read_by(self, case: Case) -> dict[str, float]:
        """The share of the partners' difference that each direct path brings about."""
        pairs, half = case.pairs, len(case.pairs) // 2
        prompts, receivers = pairs.prompts.prompts, self._receivers(case.pairs)
        paths = path_patch(
            pairs.model,
            prompts,
            prompts[half:] + prompts[:half],
            pairs.site,
            receivers,
            where=pairs.where,
            receiver_where=LAST,
            subspace=case.subspace,
        )
        ends = paths.source.sites
        values = outcomes(
            pairs.model, prompts, [replace(paths, source=paths.source.only([end])) for end in ends], [case.metric]
        )[0]
        return {end.short: float(share) for end, share in zip(ends, pairs.shares(values).mean(1), strict=True)}


def writers(pairs: Natural, moved: Float[Tensor, "rows d"]) -> dict[str, float]:
    """Each component's share of what an exchange of residual states moves, and that of all below; empty elsewhere."""
    site, unsupported = pairs.site, pairs.model.spec.unsupported
    if site.stream not in RESIDUAL:
        return {}
    below = [Site(layer, name) for layer in range(site.layer + 1) for name in ("attn_out", "mlp_out")]
    sites = [s for s in below if s.order < site.order and s.stream not in unsupported]
    if not sites:
        return {"the embeddings": 1.0}
    acts = pairs.model.capture(pairs.prompts, sites=sites, where=pairs.where)
    partner = partner_rows(acts.prompt.cpu(), len(pairs), pairs.where)
    wide = moved.double()
    length = wide.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    found = dict[str, float]()
    for source in sites:
        states = acts.at(source).double().cpu()
        found[source.short] = float((wide * (states[partner] - states)).sum() / length)
    return {**found, "the embeddings": 1 - sum(found.values())}
