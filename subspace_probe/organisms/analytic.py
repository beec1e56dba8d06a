"""Networks small enough to be solved by hand, in which a patch within one direction deceives: the checks' own test.

`ThreeNeurons` is the example of Makelov, Lange & Nanda 2023, arXiv:2311.17030, section 3, with every number exact.
`DeadMLP` is the same on a skip path in any number of dimensions, with noise, and with a twin in which the same subspace
is what the network uses. Their labels hold by construction. Float64 on the CPU.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Float64
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.linalg.bases import random_directions, random_subspace
from subspace_probe.linalg.illusions import bisector, row_space, split_by_row_space
from subspace_probe.linalg.projections import project, reject

TAIL: Final = 0.001
"""Natural range of a coordinate: without so large a share at either end."""


class Exchanged(NamedTuple):
    """Metric values of an interchange, one row a pair."""

    base: Float64[Tensor, " n"]
    source: Float64[Tensor, " n"]
    patched: Float64[Tensor, " n"]
    """At the base, with something of the source in it."""

    @property
    def effect(self) -> float:
        """Share of the difference between base and source that was brought about, a ratio of means over pairs."""
        return float((self.patched - self.base).mean() / (self.source - self.base).mean())


# ------------------------------------------------------------------------------------------------------ three neurons
@final
@dataclass(frozen=True)
class ThreeNeurons:
    """h = x w_in with w_in = (1, 0, 1), and y = w_out . h with w_out = (0, 2, 1), so that y = x.

    The first neuron varies with the input and nothing reads it; the second would be read and never varies; the third
    carries the value. A patch along the first two together, `illusory`, does all that a patch of the third does.
    Inputs are tensors [n], and the metric is y itself.
    """

    w_in: tuple[float, float, float] = (1.0, 0.0, 1.0)
    w_out: tuple[float, float, float] = (0.0, 2.0, 1.0)

    @property
    def illusory(self) -> Float64[Tensor, "1 3"]:
        """(e1 + e2) / sqrt(2): the sensor e1 supplies the coordinate, the actuator e2 the effect."""
        return torch.tensor([[0.5**0.5, 0.5**0.5, 0.0]], dtype=torch.float64)

    @property
    def faithful(self) -> Float64[Tensor, "1 3"]:
        """e3, which carries the value."""
        return torch.eye(3, dtype=torch.float64)[2:]

    @property
    def component(self) -> Float64[Tensor, "2 3"]:
        """e1 and e2, the component that `illusory` lies in; e3 passes it by."""
        return torch.eye(3, dtype=torch.float64)[:2]

    def states(self, x: Float64[Tensor, " n"]) -> Float64[Tensor, "n 3"]:
        """h."""
        return torch.outer(x, x.new_tensor(self.w_in))

    def output(self, h: Float64[Tensor, "n 3"]) -> Float64[Tensor, " n"]:
        """y."""
        return h @ h.new_tensor(self.w_out)

    def patched_states(
        self, basis: Float64[Tensor, "k 3"], x: Float64[Tensor, " n"], source: Float64[Tensor, " n"]
    ) -> Float64[Tensor, "n 3"]:
        """h at the bases, with the sources' component in the subspace."""
        base = self.states(x)
        return base + project(self.states(source) - base, basis)

    def patch(
        self, basis: Float64[Tensor, "k 3"], x: Float64[Tensor, " n"], source: Float64[Tensor, " n"]
    ) -> Exchanged:
        """What that does to y."""
        patched = self.output(self.patched_states(basis, x, source))
        return Exchanged(self.output(self.states(x)), self.output(self.states(source)), patched)

    def ablate(self, basis: Float64[Tensor, "k 3"], x: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """y without the component in the subspace: necessity along it, which takes `illusory` for necessary."""
        return self.output(reject(self.states(x), basis))

    def restore(
        self, basis: Float64[Tensor, "k 3"], x: Float64[Tensor, " n"], source: Float64[Tensor, " n"]
    ) -> Float64[Tensor, " n"]:
        """y at the sources with the bases' component put back: what does not return is mediated elsewhere."""
        return self.output(self.patched_states(basis, source, x))

    def steer(self, direction: Float64[Tensor, " 3"], amount: float, x: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """y with `amount * direction` added to h: x + amount w_out . direction."""
        return self.output(self.states(x) + amount * direction)

    def reroute(self, coordinate: Float64[Tensor, " 3"], target: float) -> Float64[Tensor, " 1"]:
        """The input at which `coordinate . h` is the target.

        Raises:
            ConfigError: no input moves that coordinate.
        """
        gain = float(coordinate @ coordinate.new_tensor(self.w_in))
        if gain == 0.0:
            raise ConfigError("Inputs do not move this coordinate, so none brings it to a target. Take another.")
        return coordinate.new_tensor([target / gain])

    def distance(self, h: Float64[Tensor, "n 3"]) -> Float64[Tensor, " n"]:
        """From states to the line of natural ones, {x w_in}."""
        line = h.new_tensor(self.w_in)
        return reject(h, (line / line.norm())[None]).norm(dim=1)


# ----------------------------------------------------------------------------------------------------------- dead MLP
@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """Bases and sources with opposite values and noise of their own.

    Attributes:
        value: f of the base, +1 or -1 in turn; the source's is -f.
        residual: r of the bases; `source_residual` that of the sources.
        hidden: the MLP's activations at the bases; `source_hidden` at the sources.
    """

    value: Float64[Tensor, " n"]
    residual: Float64[Tensor, "n d"]
    source_residual: Float64[Tensor, "n d"]
    hidden: Float64[Tensor, "n m"]
    source_hidden: Float64[Tensor, "n m"]


class Dormancy(NamedTuple):
    """How far a patch takes the coordinate that it acts through from where it is by itself."""

    sd: float
    """Within a class, natural; where it is zero, what follows is 0 or infinite."""
    d_prime: float
    """Distance between the classes' natural means, in such standard deviations."""
    z: float
    """Distance of the patched mean from the natural mean of the class that was patched in; the larger of both."""


@final
@dataclass(frozen=True)
class DeadMLP:
    """An MLP beside a skip path: r = f u + noise, h = A r + noise, y = u . ((1 - c) r + B h), and y = f in the mean.

    A is an isometry, so that the MLP holds the value f = +1 or -1 along its sensor s = A u. With c = `carries` = 0 its
    reader B does not see s, and the skip path alone carries f: patching the whole MLP does nothing, and patching within
    `v`, halfway between the sensor and what B does see, does everything. With c = 1 nothing but the MLP carries f, and
    `v` is s, which B sees: the faithful twin. Between them the effect of the whole is c, and that of `v` larger.

    The metric of a pair is the margin of the base's own value, f y.

    Args:
        d: width of the residual stream.
        m: of the MLP, larger than d.
        noise: standard deviation of each coordinate of r, but none along u.
        hidden_noise: of each coordinate of h.
        seed: of u, A and B.
        carries: c, the share of f that goes through the MLP.
    """

    d: int = 8
    m: int = 32
    noise: float = 0.1
    hidden_noise: float = 0.05
    seed: int = 0
    carries: float = 0.0

    def __post_init__(self) -> None:
        if not (2 <= self.d < self.m and self.noise >= 0 and self.hidden_noise >= 0 and 0 <= self.carries <= 1):
            raise ConfigError(f"{self} was asked for. It needs 2 <= d < m, noise >= 0 and carries in [0, 1].")

    @classmethod
    def illusory(cls, seed: int) -> "DeadMLP":
        """With sizes and noise drawn by the seed, and an MLP that carries nothing."""
        return cls(*_drawn(seed), seed=seed, carries=0.0)

    @classmethod
    def faithful(cls, seed: int) -> "DeadMLP":
        """The twin of `illusory` with the same sizes and noise, whose MLP carries the value."""
        return cls(*_drawn(seed), seed=seed, carries=1.0)

    # ----------------------------------------------------------------------------------------------- what it is made of
    @cached_property
    def readout(self) -> Float64[Tensor, " d"]:
        """u: where f is in the residual stream, and what is read at the end."""
        return random_directions(1, self.d, seed=self.seed, dtype=torch.float64)[0]

    @cached_property
    def isometry(self) -> Float64[Tensor, "m d"]:
        """A."""
        return random_subspace(self.d, self.m, seed=self.seed + 1, dtype=torch.float64).T

    @cached_property
    def reader(self) -> Float64[Tensor, "d m"]:
        """B, the MLP's output weight: B s = c u, and |u . B| = 2 (1 - c) outside of s."""
        drawn = random_directions(self.d, self.m, seed=self.seed + 2, dtype=torch.float64)
        blind = reject(drawn, self.sensor[None])
        blind = blind * (2 / (self.readout @ blind).norm())
        carried = self.sensor - self.readout @ blind
        return blind + self.carries * torch.outer(self.readout, carried)

    @cached_property
    def sensor(self) -> Float64[Tensor, " m"]:
        """s = A u: along it the MLP holds f."""
        return self.isometry @ self.readout

    @cached_property
    def gradient(self) -> Float64[Tensor, " m"]:
        """G = B^T u, of y by the MLP's activations: 2 (1 - c) a + c s with a unit vector a that s does not touch."""
        return self.readout @ self.reader

    @cached_property
    def v(self) -> Float64[Tensor, " m"]:
        """The bisector of sensor and gradient: the direction in which a patch does most."""
        return bisector(self.sensor[None], self.gradient[None])[0]

    def actuator(self, basis: Float64[Tensor, "k m"]) -> Float64[Tensor, "a m"] | None:
        """The part of a subspace that the reader sees, with orthonormal rows; None where it sees nothing."""
        return split_by_row_space(basis, row_space(self.reader).basis).row

    def expected_effect(self, basis: Float64[Tensor, "k m"]) -> float:
        """The effect of a patch in the limit of many pairs: (V s) . (V G)."""
        return float((basis @ self.sensor) @ (basis @ self.gradient))

    # ---------------------------------------------------------------------------------------------------- what it does
    def pairs(self, n: int, *, seed: int) -> Pairs:
        """Bases and sources; n of each."""
        generator = torch.Generator().manual_seed(seed)
        value = torch.ones(n, dtype=torch.float64)
        value[1::2] = -1.0
        base, source = (self._run(f, generator) for f in (value, -value))
        return Pairs(value, base[0], source[0], base[1], source[1])

    def _run(
        self, value: Float64[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n m"]]:
        spread = self.noise * torch.randn(len(value), self.d, generator=generator, dtype=torch.float64)
        residual = torch.outer(value, self.readout) + reject(spread, self.readout[None])
        hidden = residual @ self.isometry.T
        return residual, hidden + self.hidden_noise * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)

    def metric(
        self, pairs: Pairs, residual: Float64[Tensor, "n d"], hidden: Float64[Tensor, "n m"]
    ) -> Float64[Tensor, " n"]:
        """f y with such states in the place of the bases' own: about 1 at the bases, about -1 at the sources."""
        return pairs.value * (((1 - self.carries) * residual + hidden @ self.reader.T) @ self.readout)

    def exchanged(self, pairs: Pairs, residual: Float64[Tensor, "n d"], hidden: Float64[Tensor, "n m"]) -> Exchanged:
        """The metric there, beside what it is at the bases and at the sources."""
        base = self.metric(pairs, pairs.residual, pairs.hidden)
        source = self.metric(pairs, pairs.source_residual, pairs.source_hidden)
        return Exchanged(base, source, self.metric(pairs, residual, hidden))

    def patched_hidden(self, pairs: Pairs, basis: Float64[Tensor, "k m"]) -> Float64[Tensor, "n m"]:
        """The bases' activations with the sources' component in the subspace."""
        return pairs.hidden + project(pairs.source_hidden - pairs.hidden, basis)

    def patch(self, pairs: Pairs, basis: Float64[Tensor, "k m"]) -> Exchanged:
        """Exchange the MLP's component in a subspace."""
        return self.exchanged(pairs, pairs.residual, self.patched_hidden(pairs, basis))

    def patch_whole(self, pairs: Pairs) -> Exchanged:
        """Exchange all that the MLP holds."""
        return self.exchanged(pairs, pairs.residual, pairs.source_hidden)

    def patch_residual(self, pairs: Pairs, basis: Float64[Tensor, "k d"]) -> Exchanged:
        """Exchange the component of r in a subspace in front of both ways; the MLP is computed from it."""
        change = project(pairs.source_residual - pairs.residual, basis)
        return self.exchanged(pairs, pairs.residual + change, pairs.hidden + change @ self.isometry.T)

    def ablate(self, pairs: Pairs, basis: Float64[Tensor, "k m"]) -> Float64[Tensor, " n"]:
        """The metric without the MLP's component in a subspace (zero is its mean)."""
        return self.metric(pairs, pairs.residual, reject(pairs.hidden, basis))

    def ablate_whole(self, pairs: Pairs) -> Float64[Tensor, " n"]:
        """The metric without the MLP."""
        return self.metric(pairs, pairs.residual, torch.zeros_like(pairs.hidden))

    def clamp(
        self, pairs: Pairs, rows: Float64[Tensor, "a m"], hidden: Float64[Tensor, "n m"], *, tail: float = TAIL
    ) -> Float64[Tensor, "n m"]:
        """Activations with their coordinates along orthonormal rows brought into the natural range of both classes."""
        natural = torch.cat([pairs.hidden, pairs.source_hidden]) @ rows.T
        low, high = natural.quantile(tail, dim=0), natural.quantile(1 - tail, dim=0)
        inside = hidden @ rows.T
        return hidden + (inside.clamp(low, high) - inside) @ rows

    def dormancy(self, pairs: Pairs, direction: Float64[Tensor, " m"]) -> Dormancy:
        """Whether what a patch within a direction acts through varies by itself.

        Raises:
            ConfigError: the reader sees nothing of the direction.
        """
        rows = self.actuator(direction[None] / direction.norm())
        if rows is None:
            raise ConfigError("The MLP's reader sees nothing of this direction, so it has no actuator. Take another.")
        natural, target = pairs.hidden @ rows[0], pairs.source_hidden @ rows[0]
        patched = self.patched_hidden(pairs, direction[None] / direction.norm()) @ rows[0]
        up = pairs.value > 0
        gap = float((natural[up].mean() - natural[~up].mean()).abs())
        sd = float(((natural[up].var() + natural[~up].var()) / 2).sqrt())
        away = [(float((patched[of].mean() - target[of].mean()).abs()), float(target[of].std())) for of in (up, ~up)]
        return Dormancy(sd, _in_units(gap, sd), max(_in_units(*pair) for pair in away))

    def moves(self, pairs: Pairs) -> tuple[Float64[Tensor, "n m"], Float64[Tensor, "n m"]]:
        """D and G of every pair; G in shares of the difference between values: D.G is the effect of the whole."""
        return pairs.source_hidden - pairs.hidden, torch.outer(-pairs.value / 2, self.gradient)


def _drawn(seed: int) -> tuple[int, int, float, float]:
    """d, m, noise and hidden noise."""
    generator = torch.Generator().manual_seed(seed)
    d = int(torch.randint(6, 17, (), generator=generator))
    wider = int(torch.randint(3, 7, (), generator=generator))
    share = torch.rand(2, generator=generator, dtype=torch.float64)
    return d, wider * d, float(0.05 + 0.15 * share[0]), float(0.02 + 0.08 * share[1])


def _in_units(distance: float, sd: float) -> float:
    """In standard deviations; what is below 1e-12 is rounding."""
    if sd > 1e-12:
        return distance / sd
    return float("inf") if distance > 1e-12 else 0.0
