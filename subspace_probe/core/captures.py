"""A capture: what its rows will be, known before any is computed, and where they go.

Rows are computed in parts of consecutive prompts. A sink keeps whole parts, so that what is on disk of an interrupted
capture is never computed again.
"""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from subspace_probe.core.activations import Activations, MemoryRows
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError
from subspace_probe.core.keys import content_key
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where


@final
@dataclass(frozen=True)
class Part:
    """Consecutive prompts, and the rows they give."""

    first: int
    after: int
    start: int
    stop: int


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A capture before it runs.

    Attributes:
        widths: sites in forward order, with their widths.
        dtype: of the rows.
        prompt: which prompt each row is from, shape [n].
        position: absolute position of each row's token, shape [n].
        parts: all prompts, in order.
        depends: what the rows depend on, by name: model, prompts, sites, ...
        notes: plain values for whoever reads the rows.
        made: how the rows are computed; other ways give the same rows but for rounding, so they are not in the key.
    """

    contrast: Contrast
    where: Where
    widths: Mapping[Site, int]
    dtype: torch.dtype
    prompt: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    parts: tuple[Part, ...]
    depends: Mapping[str, object]
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    made: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def asked(self) -> dict[str, str]:
        """What the rows depend on, in words or as hashes.

        Raises:
            ConfigError: interventions whose contents cannot be seen.
        """
        return {name: value if isinstance(value, str) else content_key(value) for name, value in self.depends.items()}

    @property
    def key(self) -> str:
        """Equal for captures that give the same rows."""
        return content_key(self.asked)


@runtime_checkable
class Recording(Protocol):
    """A capture under way."""

    def has(self, index: int) -> bool:
        """Whether a part is there already."""
        ...

    def write(self, index: int, part: Part, rows: Mapping[Site, Tensor]) -> None:
        """Keep a part."""
        ...

    def finish(self) -> Activations:
        """All rows."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Where captured rows go."""

    def record(self, plan: Plan) -> AbstractContextManager[Recording]: ...


@final
@dataclass(frozen=True)
class Memory:
    """Rows in memory.

    Args:
        device: where; rows leave the model's device a part at a time.
    """

    device: str = "cpu"

    @contextmanager
    def record(self, plan: Plan) -> Generator[Recording]:
        """A place for all rows at once."""
        n = len(plan.prompt)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).split("\n")[0]
            raise ConfigError(f"Memory({self.device!r}) cannot be used: {first} Leave the device out.") from None
        tensors = {site: torch.empty(n, w, dtype=plan.dtype, device=self.device) for site, w in plan.widths.items()}
        yield _InMemory(plan, tensors)


@final
@dataclass(eq=False)
class _InMemory:
    plan: Plan
    tensors: dict[Site, Tensor]

    def has(self, index: int) -> bool:
        return False

    def write(self, index: int, part: Part, rows: Mapping[Site, Tensor]) -> None:
        for site, values in rows.items():
            self.tensors[site][part.start : part.stop] = values

    def finish(self) -> Activations:
        plan = self.plan
        return Activations(
            MemoryRows(self.tensors), plan.contrast, plan.prompt, plan.position, plan.where, dict(plan.notes)
        )
