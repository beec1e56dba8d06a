"""What a study is: settings, and one function from a model to a report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from subspace_probe.core.reports import Report


@final
@dataclass(frozen=True)
class Study:
    """One paper, one file.

    Attributes:
        title: what is asked.
        citation: the paper.
        Config: frozen dataclass of settings, a string under each saying when one would change it.
        run: `run(model, config, *, contrast=None, progress=True) -> Report`.
        presets: settings by name; `tiny` runs on an organism in seconds.
        organisms: what the preset `tiny` runs on where no model is given: for each case with a truth of its own, one
            organism a seed, taken in turn. A study of one case names it "".
    """

    title: str
    citation: str
    Config: type
    run: Callable[..., Report]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    organisms: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
