"""A guard that reads given numbers of a prompt instead of a model's states: what it goes by is known."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.classifier import GuardClassifier
    from subspace_probe.models.hooked import HookedModel


def numbers_guard(
    model: "HookedModel", read: Callable[[Sequence[Any]], Any], train: "Contrast", layers: tuple[int, ...] = (0,)
) -> "GuardClassifier":
    """A fitted guard whose rows are `read(prompts)`, shape [n, features]."""
    from subspace_probe.guard.classifier import GuardClassifier
    from subspace_probe.guard.examples import examples_of
    from subspace_probe.guard.probe import LatentProbe

    class NumbersGuard(GuardClassifier):
        def states(self, X: Any) -> Any:
            return np.asarray(read(examples_of(X).prompts), dtype=np.float64)

    guard = NumbersGuard(model, LatentProbe("mean_difference"))
    guard.layers = layers
    guard.probe = LatentProbe("mean_difference").fit(guard.states(train), np.array(train.labels))
    guard.seen = {"fit": frozenset(examples_of(train).keys())}
    return guard


def contrast_of(texts: Sequence[str], labels: Sequence[int], **columns: Any) -> "Contrast":
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    return Contrast("made", tuple(Prompt(text=text) for text in texts), tuple(map(int, labels)), **columns)
