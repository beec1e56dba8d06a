"""The latent guard: a classifier on what the model itself makes of a prompt (Zhao et al. 2025, arXiv:2507.11878).

It needs no second model: it reads the states of the model that is to answer, at one position and a few layers, and its
pass ends there. What it promises, a false-positive rate, is set on negatives that nothing else has seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from subspace_probe.core.prompts import Prompt
from subspace_probe.core.reports import Report
from subspace_probe.guard import artifact, streaming
from subspace_probe.guard.classifier import GuardClassifier, Labels
from subspace_probe.guard.evaluation import guard_report
from subspace_probe.guard.examples import Shown
from subspace_probe.guard.streaming import Guarded
from subspace_probe.models.hooked import HookedModel


@final
class LatentGuard(GuardClassifier):
    """A guard on text and chats.

    >>> guard = LatentGuard(model).fit(prompts, y).set_threshold(negatives, target_fpr=0.01)
    >>> guard.predict(["one more prompt"])

    Args:
        model: whose states are read. Any that the package loads, encoders too.
        probe: the classifier, cloned; `LatentProbe("lda")` by default.
        stream: the stream that is read.
        layers: which layers; "auto" takes one by cross-validation on the fit data (all for `centroid_cosine`, as
            published).
        where: the token that is read, or tokens whose mean is; see `reading.usual_where`.
        gate: makes the guard abstain on states that it does not know; none by default.
        category: what it looks for, as reports and the server call it.
        seed: of the folds.
        batch_tokens: how many tokens a batch may have.
    """

    def report(self, X: Shown, y: Labels | None = None, **settings: Any) -> Report:
        """How good it is on prompts that it has not seen; see `guard.evaluation.guard_report`."""
        return guard_report(self, X, y, **settings)

    def fit_stream(self, X: Shown, y: Labels | None = None, **settings: Any) -> "LatentGuard":
        """Fit a probe on the tokens of the model's own answers; see `guard.streaming.fit_stream`."""
        streaming.fit_stream(self, X, y, **settings)
        return self

    def set_stream_threshold(self, negatives: Shown, **settings: Any) -> "LatentGuard":
        """Set the threshold of answers on their running maximum; see `guard.streaming.stream_threshold`."""
        streaming.stream_threshold(self, negatives, **settings)
        return self

    def generate(
        self,
        X: Shown,
        *,
        replacement: str | None = None,
        route: Callable[[Prompt], str] | None = None,
        **settings: Any,
    ) -> list[Guarded]:
        """Answers that are watched while they are made; see `guard.streaming.watch`."""
        return streaming.watch(self, X, replacement=replacement, route=route, **settings)

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, whole or not at all: guard.json and guard.safetensors."""
        return artifact.save_guard(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, model: HookedModel, *, allow_model_mismatch: bool = False) -> "LatentGuard":
        """Read a guard for this model.

        Args:
            allow_model_mismatch: accept another fingerprint, for instance after fine-tuning: what the guard promises
                was measured on the old weights. Another chat template is never accepted.

        Raises:
            StoreError: no such guard, or a damaged one.
            StaleStore: made for another model or chat template.
        """
        return artifact.load_guard(cls, Path(folder), model, allow_model_mismatch=allow_model_mismatch)
