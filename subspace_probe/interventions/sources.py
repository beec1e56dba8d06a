"""States to put in the place of a model's own: another prompt's, a mean, a stored or a stated value."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import DataError, ShapeError, SiteError, StaleStore
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where


@final
@dataclass(frozen=True, eq=False)
class Source:
    """States of one or several sites, one row a token.

    Attributes:
        states: by site, shape [rows, width].
        prompt: for which prompt of the call each row is, ascending, in the order of its tokens, shape [rows]; None
            where there is one row, which serves every token of every prompt.
        where: the tokens the rows were taken from; for the record.
        n: of how many prompts, where the last ones may have no rows; else told from `prompt`.
        notes: where the states come from; plain JSON values. A "fingerprint" ties them to its model.
    """

    states: Mapping[Site, Float[Tensor, "rows width"]]
    prompt: Int[Tensor, " rows"] | None = None
    where: Where | None = None
    n: int | None = None
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not self.states:
            raise SiteError("A source without states was given. Name at least one site.")
        rows = 1 if self.prompt is None else len(self.prompt)
        for site, states in self.states.items():
            if states.ndim != 2 or len(states) != rows:
                raise ShapeError(
                    f"The states for {site.short} have shape {tuple(states.shape)}, but {rows} rows were announced. "
                    "Give shape [rows, width], one row a token."
                )
            bad = (~states.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                raise ShapeError(
                    f"The states for {site.short} are not finite in rows {bad[:10]}. Leave these prompts out, or "
                    "capture in bfloat16 or float32."
                )
        if self.prompt is not None and (len(self.prompt) == 0 or bool((self.prompt.diff() < 0).any())):
            raise ShapeError("The rows of a source must be in the order of their prompts, and at least one.")

    @classmethod
    def of(cls, acts: Activations, *sites: Site) -> "Source":
        """The rows of captured activations, in memory or from a store: prompt i of them is for prompt i of the call.

        Args:
            sites: which of those captured; all by default.

        Raises:
            SiteError: a site that was not captured.
        """
        chosen = sites or acts.sites
        return cls({site: acts.at(site) for site in chosen}, acts.prompt, acts.where, len(acts.contrast), _origin(acts))

    @classmethod
    def mean(cls, acts: Activations, *sites: Site) -> "Source":
        """The mean state of captured activations, for every token of every prompt."""
        means: dict[Site, Tensor] = {}
        for site in sites or acts.sites:
            total = torch.zeros(acts.width(site), dtype=torch.float64)
            for block, _ in acts.batches(site):
                total += block.double().sum(0).cpu()
            means[site] = (total / acts.rows.n).float()[None]
        return cls(means, None, acts.where, notes={**_origin(acts), "mean_of": acts.rows.n})

    @classmethod
    def value(cls, site: Site, state: Float[Tensor, " width"]) -> "Source":
        """One stated state, for every token of every prompt; zeros, for instance."""
        return cls({site: state[None]}, notes={"value": "stated"})

    @classmethod
    def resampled(cls, acts: Activations, *, seed: int = 0) -> "Source":
        """States of other prompts: prompts exchange their rows by a random cycle, so that none keeps its own.

        Raises:
            DataError: prompts with different numbers of rows, or fewer than two.
        """
        counts = torch.bincount(acts.prompt.cpu())
        if len(counts) < 2 or len(counts.unique()) > 1:
            raise DataError(
                f"{len(counts)} prompts with {int(counts.min())} to {int(counts.max())} rows each cannot stand for "
                "each other. Give at least two prompts, and one token of each, such as LAST."
            )
        order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
        drawn = torch.empty_like(order)
        drawn[order] = order.roll(1)
        rows = (drawn[:, None] * counts[0] + torch.arange(int(counts[0]))).flatten()
        states = {site: acts.at(site)[rows] for site in acts.sites}
        return cls(states, acts.prompt, acts.where, notes={**_origin(acts), "resampled": seed})

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where there are states, in forward order."""
        return tuple(sorted(self.states, key=lambda site: (site.order, site.head or 0)))

    @property
    def fingerprint(self) -> str | None:
        """Of the model the states were captured from, where it is known."""
        return self.notes.get("fingerprint")

    def resolve(self, n_layers: int) -> "Source":
        """The same with layers counted from the front.

        Raises:
            SiteError: a layer the model does not have, or one site under two names.
        """
        states = {site.resolve(n_layers): rows for site, rows in self.states.items()}
        if len(states) < len(self.states):
            raise SiteError("Two of the source's sites are one site of this model. Name each once.")
        return replace(self, states=states)

    def only(self, sites: Collection[Site]) -> "Source":
        """The states of these sites alone.

        Raises:
            SiteError: a site it has no states for.
        """
        if missing := [site.short for site in sites if site not in self.states]:
            held = ", ".join(site.short for site in self.sites)
            raise SiteError(
                f"States for {', '.join(missing)} were asked for, but the source holds {held}. Capture them."
            )
        return replace(self, states={site: self.states[site] for site in sites})

    def at(self, site: Site) -> "Source":
        """The same states, of whichever one site they are, for another site: stated, never guessed."""
        if len(self.states) != 1:
            raise SiteError(f"This source holds {len(self.states)} sites; only states of one can be moved to another.")
        return replace(self, states={site: next(iter(self.states.values()))})

    def require_model(self, fingerprint: str) -> None:
        """Check that the states were captured from this very model.

        Raises:
            StaleStore: another model's fingerprint.
        """
        if self.fingerprint not in (None, fingerprint):
            raise StaleStore(
                f"These states were captured from {self.notes.get('model', 'another model')} (fingerprint "
                f"{str(self.fingerprint)[:12]}), but are put into a model of fingerprint {fingerprint[:12]}. Capture "
                "them from this model, or use source.for_any_model() if that is what you want."
            )

    def require_width(self, width: int, site: Site) -> None:
        """Check that the states fit a site.

        Raises:
            ShapeError: another width.
        """
        if (own := self.states[site].shape[1]) != width:
            raise ShapeError(f"The states for {site.short} are {own} wide, but the activations there are {width} wide.")

    def for_any_model(self) -> "Source":
        """The same states, no longer tied to the model they were captured from."""
        notes = {name: value for name, value in self.notes.items() if name != "fingerprint"}
        return replace(self, notes={**notes, "captured_from": self.fingerprint})

    def __repr__(self) -> str:
        rows = "one state" if self.prompt is None else f"{len(self.prompt)} states"
        return f"Source({rows} at {', '.join(site.short for site in self.sites)})"


def _origin(acts: Activations) -> dict[str, Any]:
    return {name: acts.notes[name] for name in ("model", "fingerprint", "data") if name in acts.notes}
