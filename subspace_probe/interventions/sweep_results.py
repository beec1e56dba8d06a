"""What a patching sweep found: an effect for each cell, as arrays, a table and a report."""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.findings import Finding
from subspace_probe.core.intervals import mean_of
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.core.sites import Stream


@final
@dataclass(frozen=True, eq=False)
class PatchSweep:
    """A metric under the exchange of every cell's state, per prompt.

    Attributes:
        values: the metric of the patched runs, shape [stream, layer, position, n], with heads [stream, layer, position,
            head, n].
        clean: the metric of the clean prompts, shape [n].
        corrupt: that of the corrupt prompts, asked for the clean prompts' answers, shape [n].
        streams: names of the first axis.
        layers: numbers of the second.
        positions: names of the third.
        texts: the token there, where all clean prompts agree on it.
        mode: "denoise": the corrupt prompts were run, clean states put in; "noise": the reverse.
        metric: its name.
        groups: of the prompts; intervals go by group.
        computed: number of patched runs, one a cell and prompt.
        skipped: runs that were not needed, because the exchanged states are equal bit for bit.
        engine: "climbing" or "passes"; the results are the same, the time is not.
        notes: where the numbers come from.
        seed: of the bootstrap.
    """

    values: Float64[Tensor, "stream layer *cell n"]
    clean: Float64[Tensor, " n"]
    corrupt: Float64[Tensor, " n"]
    streams: tuple[Stream, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    texts: tuple[str, ...]
    mode: str
    metric: str
    groups: Int[Tensor, " n"]
    computed: int
    skipped: int
    engine: str
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0

    @property
    def base(self) -> Float64[Tensor, " n"]:
        """The metric of the prompts that were run."""
        return self.corrupt if self.mode == "denoise" else self.clean

    @property
    def source(self) -> Float64[Tensor, " n"]:
        """The metric of the prompts whose states were put in."""
        return self.clean if self.mode == "denoise" else self.corrupt

    @property
    def heads(self) -> bool:
        """Whether there is an axis of heads."""
        return self.values.ndim == 5

    @property
    def effect(self) -> Float64[Tensor, "stream layer *cell"]:
        """(patched - base) / (source - base), a ratio of means over prompts: 0 nothing, 1 all of the difference.

        Raises:
            ConfigError: the metric does not tell clean from corrupt prompts.
        """
        self.require_gap()
        return (self.values - self.base).mean(-1) / (self.source - self.base).mean()

    def require_gap(self) -> None:
        """Check that clean and corrupt prompts differ by more than rounding, so that there is something to share out.

        Raises:
            ConfigError: they do not.
        """
        gap, size = (self.source - self.base).mean(), torch.cat([self.source, self.base]).abs().mean()
        if not float(gap.abs()) > 1e-6 * float(size):
            raise ConfigError(
                f"{self.metric} is the same for the clean and the corrupt prompts ({float(size):.3g} in size, apart "
                f"by {float(gap):.3g}), so there is no difference that a state could carry. Choose a metric "
                "that tells them apart, such as logit_difference with the two answers."
            )

    @property
    def unresolved(self) -> str:
        """Why effects mean little: the difference between the prompts may itself be 0. Empty where it may not."""
        gap, interval = mean_of(self.source - self.base, self.groups, seed=self.seed)
        if not interval.low <= 0 <= interval.high:
            return ""
        around = f"{gap:.3g}, 95 % {interval.low:.3g} to {interval.high:.3g}"
        return f"inconclusive: the prompts' difference may itself be 0 ({around}), so shares of it mean little"

    @property
    def table(self) -> Table:
        """One row a cell: what `figures.heatmap` draws."""
        means, effects = self.values.mean(-1), self.effect
        rows: list[tuple[Any, ...]] = []
        for index in torch.cartesian_prod(*map(torch.arange, means.shape)).tolist():
            s, layer, p, *head = index
            place = (
                self.streams[s],
                self.layers[layer],
                self.positions[p],
                p,
                self.texts[p],
                head[0] if head else None,
            )
            rows.append((*place, float(means[tuple(index)]), float(effects[tuple(index)])))
        columns = ("stream", "layer", "position", "order", "token", "head", "patched", "effect")
        about = f"{self.metric} after the exchange of one state ({self.mode}), mean of {len(self.base)} prompts"
        about += f"; effects are {self.unresolved}" if self.unresolved else ""
        return Table(columns, tuple(rows), about)

    def report(self) -> Report:
        """The table, the two baselines, and the strongest cell with its interval; unaudited."""
        n, effects = len(self.base), self.effect
        found: list[Finding] = []
        for name, values in (("clean", self.clean), ("corrupt", self.corrupt)):
            estimate, interval = mean_of(values, self.groups, seed=self.seed)
            claim = f"{self.metric} of the {name} prompts"
            found.append(Finding(f"{self.metric}.{name}", claim, estimate, interval, n=n))
        strongest = tuple(torch.unravel_index(effects.abs().argmax(), effects.shape))
        effect, gap = effects[strongest], self.source - self.base
        # a ratio of means by its linear approximation: each prompt's part of the deviation
        parts = effect + (self.values[strongest] - self.base - effect * gap) / gap.mean()
        s, layer, p, *head = (int(i) for i in strongest)
        cell = f"{self.streams[s]} of layer {self.layers[layer]} at {self.positions[p]}"
        cell += f", head {head[0]}" if head else ""
        note = f"chosen as the largest of {effects.numel()} cells on these very prompts, so it is likely too large"
        unresolved = self.unresolved
        note += f"; {unresolved}" if unresolved else ""
        interval = None if unresolved else mean_of(parts, self.groups, seed=self.seed)[1]
        claim = f"the exchange of {cell} carries part of the difference"
        found.append(Finding("effect.strongest", claim, float(effect), interval, n=n, note=f"{cell}; {note}"))
        work = Table(("computed", "skipped", "engine"), ((self.computed, self.skipped, self.engine),), "runs")
        config = {"metric": self.metric, "mode": self.mode, **self.notes.get("config", {})}
        given = {key: self.notes[key] for key in ("model", "fingerprint", "data") if key in self.notes}
        provenance = Provenance.now(config=config, seed=self.seed, **given)
        return Report("patch_sweep", tuple(found), {"patch_sweep": self.table, "work": work}, provenance)
