"""Prompts, cross-section and dictionaries of `sae_evaluation`: everything that stands before the three tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, StoreError, unknown
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.tokens import Where
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.configuration import Configuration
from subspace_probe.dictionaries.loading import load_sae
from subspace_probe.interventions.patch_cells import Cells, rerun
from subspace_probe.interventions.patch_sweep import patch_sweep
from subspace_probe.interventions.sweep_results import PatchSweep
from subspace_probe.linalg.bases import random_directions
from subspace_probe.metrics.answers import LogitDifference
from subspace_probe.models.hooked import HookedModel
from subspace_probe.organisms import organism_contrast

RESTORED = 0.95
"""A state is a cross-section where patching it whole restores at least so much of the metric, as the study requires of
the skyline."""
_AT_ONCE, _TOKENS = 100, 4096
"""Sets of states that are put in together, and tokens a pass may run on."""
Columns = Mapping[str, Int[Tensor, " n"]]


@runtime_checkable
class Settings(Protocol):
    """What this file needs of the study's settings."""

    @property
    def n_train(self) -> int: ...
    @property
    def n_validation(self) -> int: ...
    @property
    def n_test(self) -> int: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def site(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def saes(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@final
@dataclass(frozen=True, eq=False)
class Parts:
    """Prompts in three parts that share no group."""

    train: Contrast
    validation: Contrast
    test: Contrast


def organism_of(model: HookedModel) -> str:
    """The organism's name; empty for a user's model."""
    name = model.spec.name.removeprefix("organism:")
    return "" if name == model.spec.name else name


def parts_of(model: HookedModel, config: Settings, contrast: Contrast | None) -> Parts:
    """The organism's own prompts, or the user's, split by group.

    Raises:
        ConfigError: a user's model without prompts.
        DataError: prompts without answer and foil, or without the attributes.
    """
    sizes = {"train": config.n_train, "val": config.n_validation, "test": config.n_test}
    if contrast is None:
        if not (organism := organism_of(model)):
            raise ConfigError(
                f"The study needs prompts for {model.spec.name} (--contrast prompts.jsonl) with 'prompt', 'label', "
                f"'answer', 'foil' and a whole number for each of the attributes {', '.join(config.attributes)}."
            )
        drawn = [organism_contrast(f"{organism}/ioi", split=s, n=n, seed=config.seed) for s, n in sizes.items()]
    else:
        train, rest = contrast.split(0.6, seed=config.seed)
        drawn = [train, *rest.split(0.4, seed=config.seed)]
        drawn = [part.sample(n, seed=config.seed) for part, n in zip(drawn, sizes.values(), strict=True)]
    for part in drawn:
        if missing := [name for name in config.attributes if name not in part.factors]:
            raise unknown("attribute (a column of whole numbers)", missing[0], part.factors)
        if not all(prompt.answer and prompt.foil for prompt in part.prompts):
            raise DataError(
                f"A prompt of {part.name!r} has no 'answer' or no 'foil', which the logit difference needs."
            )
    return Parts(*drawn)


def columns_of(contrast: Contrast, names: Sequence[str]) -> dict[str, Int[Tensor, " n"]]:
    """The attributes of every prompt."""
    return {name: torch.tensor(contrast.factors[name]) for name in names}


def partners(columns: Columns, name: str, *, seed: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows that have a partner which differs in this attribute and in no other, and one such partner each, drawn."""
    generator = torch.Generator().manual_seed(seed)
    n = len(columns[name])
    fits = columns[name][:, None] != columns[name]
    for other, column in columns.items():
        if other != name:
            fits = fits & (column[:, None] == column)
    has = fits.any(1).nonzero().flatten()
    draws = torch.rand(n, n, generator=generator).masked_fill(~fits, -1)
    return has, draws.argmax(1)[has]


# ---------------------------------------------------------------------------------------------------- cross-section
def find_cross_section(model: HookedModel, prompts: Contrast, config: Settings) -> tuple[Site, float, PatchSweep]:
    """The earliest state at the position whose exchange moves the whole answer, or the site that was asked for.

    Every residual state of every layer is exchanged with that of a prompt with another answer and foil.

    Returns:
        The site, the share of the answer that its exchange restores, and the sweep.

    Raises:
        ConfigError: no state does.
    """
    streams: list[Stream] = [name for name in ("resid_pre", "resid_mid") if name not in model.spec.unsupported]
    others = _other_answers(prompts)

    def sweep(streams: Sequence[Stream], layers: Sequence[int] | None = None, heads: bool = False) -> PatchSweep:
        return patch_sweep(
            model,
            prompts,
            others,
            "logit_difference",
            streams=streams,
            layers=layers,
            positions=[config.where],
            heads=heads,
            seed=config.seed,
        )

    swept = sweep(streams)
    if config.site:
        asked = Site.parse(config.site).resolve(model.spec.n_layers)
        alone = sweep([asked.stream], [asked.layer], heads=asked.head is not None)
        return asked, float(alone.effect.flatten()[asked.head or 0]), swept
    sites = {Site(layer, name): (i, j) for i, name in enumerate(streams) for j, layer in enumerate(swept.layers)}
    for site in sorted(sites, key=lambda site: site.order):
        if (restored := float(swept.effect[(*sites[site], 0)])) >= RESTORED:
            return site, restored, swept
    raise ConfigError(
        f"No single residual state at {config.where} restores {RESTORED:.0%} of the answer; the best restores "
        f"{float(swept.effect.max()):.0%}. Give another position (--set where=...), or a site (--set site=L3.attn_out)."
    )


def _other_answers(part: Contrast) -> list[Prompt]:
    """For each prompt another one whose answer and foil both differ."""
    n, asked = len(part), [{prompt.answer, prompt.foil} for prompt in part.prompts]
    found: list[Prompt] = []
    for i in range(n):
        rows = [(i + k) % n for k in range(n // 2, n // 2 + n) if not asked[i] & asked[(i + k) % n]]
        if not rows:
            raise DataError(f"No prompt of {part.name!r} has another answer and foil than {asked[i]}. Add prompts.")
        found.append(part.prompts[rows[0]])
    return found


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """Some prompts, and what the model does with other states at the cross-section."""

    model: HookedModel
    site: Site
    where: Where
    contrast: Contrast

    def run(self, states: Sequence[Float[Tensor, "n d"]]) -> Float64[Tensor, "measure condition n"]:
        """What the model says with each set of states in the place of its own.

        The logit difference, the most likely token, and KL from what it says with the first set, in nats.

        What lies below the state is computed once, and hundreds of sets take a few passes of what lies above.
        """
        n, prompts = len(self.contrast), self.contrast.prompts
        batch = self.model.tokens(prompts)
        columns = batch.ids.shape[1] - batch.lengths + batch.position(self.where)
        asked = LogitDifference(self.model).tokens(prompts)
        out = torch.full((3, len(states) * n), float("nan"), dtype=torch.float64)
        first = torch.empty(n, self.model.spec.d_vocab)

        def emit(logits: Tensor, places: Tensor) -> None:
            shown = logits.detach().float().cpu()
            found = shown.gather(1, asked[places % n])
            out[0, places], out[1, places] = (found[:, 0] - found[:, 1]).double(), shown.argmax(-1).double()
            log_p = shown.log_softmax(-1)
            first[places[places < n]] = log_p[places < n]
            reference = first[places % n]
            out[2, places] = (reference.exp() * (reference - log_p)).sum(-1).double()

        for start in range(0, len(states), _AT_ONCE):
            some = states[start : start + _AT_ONCE]
            places = torch.arange(start * n, (start + len(some)) * n)
            cells = Cells(self.site, places % n, columns[places % n], torch.cat(list(some)), places)
            rerun(self.model, batch, [cells], None, _TOKENS, emit)
        return out.view(3, len(states), n)


# ------------------------------------------------------------------------------------------------------- dictionaries
def learned(model: HookedModel, site: Site, config: Settings) -> dict[str, SparseAutoencoder]:
    """The autoencoders to be compared, by name.

    Raises:
        ConfigError: none for a user's model, or an entry without a name.
        SiteError, ShapeError: one that does not fit the cross-section.
    """
    named: dict[str, SparseAutoencoder] = {}
    if config.saes:
        for entry in (entry for entry in config.saes if entry != "none"):
            name, equals, place = entry.partition("=")
            if not equals or not name or not place:
                raise ConfigError(f"saes has {entry!r}. Write name=folder, or name=release:id, or none.")
            named[name] = _loaded(place)
    elif organism := organism_of(model):
        from subspace_probe.organisms.autoencoders import autoencoder_path

        named = {name: load_sae(autoencoder_path(organism, name)) for name in ("task", "broad", "frozen")}
    else:
        raise ConfigError(
            f"No autoencoders were given for {model.spec.name}. Write --set saes=task=FOLDER,web=RELEASE:ID, or "
            "saes=none to fit the supervised dictionaries alone."
        )
    for sae in named.values():
        sae.require_site(site)
        sae.require_width(model.backend.width(site))
    return named


def _loaded(place: str) -> SparseAutoencoder:
    try:
        return load_sae(place)
    except StoreError:
        release, colon, sae_id = place.rpartition(":")
        if not colon:
            raise
        return load_sae(release, sae_id)


def random_dictionary(acts: Activations, site: Site, like: SparseAutoencoder | None, *, seed: int) -> SparseAutoencoder:
    """Random unit rows, read by their own projections: the largest k of a centred state, k that of `like`."""
    states = acts.at(site).float()
    d, mean = states.shape[1], states.mean(0)
    n, k = (2 * d, 8) if like is None else (like.d_sae, max(1, round(_active(like, states))))
    rows = random_directions(n, d, seed=seed).float()
    weights = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(n), "b_dec": mean}
    own = Configuration("topk", d, n, k=min(k, n), metadata={"hook_name": str(site)})
    return SparseAutoencoder(own, weights)


def _active(sae: SparseAutoencoder, states: Tensor) -> float:
    return float((sae.encode(states) != 0).double().sum(1).mean())


def shuffled(columns: Columns, *, seed: int) -> dict[str, Int[Tensor, " n"]]:
    """The attributes of other prompts, together, so that their dependence stays."""
    n = len(next(iter(columns.values())))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return {name: column[order] for name, column in columns.items()}


def answering(part: Contrast, target: Contrast) -> Contrast:
    """The same prompts, asked for the target's answer against their own."""
    pairs = zip(part.prompts, target.prompts, strict=True)
    prompts = tuple(replace(own, answer=other.answer, foil=own.answer) for own, other in pairs)
    return replace(part, prompts=prompts)
