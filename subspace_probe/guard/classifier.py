"""What a guard does by itself: fitting, calibrating, setting a threshold, judging. `guard.LatentGuard` adds files."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from tqdm.auto import tqdm

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, SmallSampleWarning
from subspace_probe.core.protocols import ModelSpec
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import ALL, Where
from subspace_probe.guard import reading
from subspace_probe.guard.calibration import Calibration
from subspace_probe.guard.examples import Examples, Groups, Item, Shown, examples_of, prompt_of
from subspace_probe.guard.judgements import Judgement, TokenScores
from subspace_probe.guard.layer_choice import LayerScore, chosen_layer, layer_scores
from subspace_probe.guard.probe import LatentProbe
from subspace_probe.guard.residual_gate import ResidualGate
from subspace_probe.guard.stream_rule import Streaming
from subspace_probe.guard.thresholds import Threshold, needed, threshold_at
from subspace_probe.models.hooked import HookedModel

_anew: Callable[..., Any] = clone  # scikit-learn ships no types, and guessed ones are wrong
Labels = Sequence[int] | NDArray[np.integer]
G = TypeVar("G", bound="GuardClassifier")
ROUNDING = 8
"""What a prompt's score may differ by from batch to batch, in steps of the model's precision times the range of scores;
in bfloat16 a third of that was seen, in float32 a fiftieth."""
USES = {"fit": "fitted on", "calibrate": "calibrated on", "threshold": "used to set the threshold"}


class GuardClassifier:
    """A guard without files and reports; see `guard.LatentGuard`."""

    def __init__(
        self,
        model: HookedModel,
        probe: LatentProbe | str | None = None,
        *,
        stream: str = "resid_post",
        layers: Literal["auto"] | Sequence[int] = "auto",
        where: Where | str | None = None,
        gate: ResidualGate | None = None,
        category: str = "harmful",
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.probe: LatentProbe = _anew(probe) if isinstance(probe, LatentProbe) else LatentProbe(probe or "lda")
        self.stream = stream
        self.asked_layers = layers
        self.where = Where.parse(where) if isinstance(where, str) else where or reading.usual_where(model)
        self.gate: ResidualGate | None = None if gate is None else _anew(gate)
        self.category = category
        self.seed = seed
        self.batch_tokens = batch_tokens
        self.layers: tuple[int, ...] = ()
        self.layer_scores: dict[int, LayerScore] = {}
        self.calibration: Calibration | None = None
        self.threshold: Threshold | None = None
        self.streaming: Streaming | None = None
        self.seen: dict[str, frozenset[str]] = {}
        self.fitted_on, self.fitted_name = model.fingerprint, model.spec.name
        self.nuisance: str | None = None
        _sites(stream, self._asked(model.spec), model.spec)

    # ------------------------------------------------------------------------------------------------------- fitting
    def fit(
        self: G,
        X: Shown,
        y: Labels | None = None,
        *,
        groups: Groups | None = None,
        nuisance: str | Sequence[float] | NDArray[np.floating] | None = None,
        progress: bool = False,
    ) -> G:
        """Choose the layer and fit the probe. A threshold and a calibration that were set before are dropped.

        Args:
            X: prompts, a contrast, or activations captured at the guard's position.
            y: 1 for what the guard looks for, 0 for the rest; a contrast brings its own.
            groups: near-duplicates and common sources; folds never separate them.
            nuisance: what the probe is not to read, for methods that take one: a factor's name, or numbers.

        Raises:
            DataError: prompts of one class only, or too few.
        """
        examples = examples_of(X, y, groups=groups, nuisance=nuisance)
        labels, asked = examples.labels, self._asked(self.model.spec)
        rows = self._rows(examples, _sites(self.stream, asked, self.model.spec))
        blocks = dict(zip(asked, np.split(rows, len(asked), axis=1), strict=True))
        scores: dict[int, LayerScore] = {}
        if self.asked_layers == "auto" and self.probe.method != "centroid_cosine":
            with tqdm(total=len(asked), desc="layers", disable=not progress, leave=False) as bar:
                scores = layer_scores(
                    self.probe, blocks, labels, examples.groups, examples.nuisance, seed=self.seed, progress=bar.update
                )
            asked = (chosen_layer(scores),)
        chosen = np.concatenate([blocks[layer] for layer in asked], axis=1)
        probe = _anew(self.probe).set_params(n_layers=len(asked))
        self.probe = probe.fit(chosen, labels, nuisance=examples.nuisance)
        if self.gate is not None:
            self.gate = _anew(self.gate).fit(chosen[labels == 0], groups=examples.groups[labels == 0])
        self.layers, self.layer_scores = asked, scores
        self.fitted_on, self.fitted_name = self.model.fingerprint, self.model.spec.name
        self.nuisance = None if nuisance is None else nuisance if isinstance(nuisance, str) else "numbers"
        self.calibration = self.threshold = self.streaming = None
        self.seen = {"fit": frozenset(examples.keys())}
        return self

    def calibrate(
        self: G,
        X: Shown,
        y: Labels | None = None,
        *,
        method: str = "sigmoid",
    ) -> G:
        """Make `predict_proba` mean what it says, on prompts that the guard was not fitted on. Moves no threshold.

        Args:
            method: "sigmoid", "isotonic" (wants about a thousand prompts) or "temperature".

        Raises:
            DataError: prompts that it was fitted or its threshold set on, or fewer than five of a class.
        """
        examples = examples_of(X, y)
        self.require_fresh(examples, "calibrate", ("fit", "threshold"))
        scores = self.decide(self._rows(examples, self.sites))
        self.calibration = Calibration.fit(scores, examples.labels, method)
        self.use("calibrate", examples)
        return self

    def set_threshold(
        self: G,
        negatives: Shown,
        *,
        target_fpr: float = 0.01,
        confidence: float | None = 0.95,
        groups: Groups | None = None,
    ) -> G:
        """Set the threshold so that at most a stated share of negatives like these is flagged; see `threshold_at`.

        Args:
            negatives: traffic-like, hard benign prompts among them; none that the guard was fitted, its layer chosen
                or its probabilities calibrated on.
            target_fpr: the share.
            confidence: with which the share is at most that; None: on average over such sets of negatives.
            groups: near-duplicates and common sources: each counts once.

        Raises:
            DataError: prompts used before, positives among them, or too few, with the number needed.
        """
        self.threshold = self.threshold_on(
            negatives, self.decision_function, target_fpr=target_fpr, confidence=confidence, groups=groups
        )
        return self

    def threshold_on(
        self,
        negatives: Shown,
        score: Callable[[Shown], NDArray[np.float64]],
        *,
        target_fpr: float,
        confidence: float | None,
        groups: Groups | None,
    ) -> Threshold:
        """A threshold on any score of fresh negatives, and the record that they were used; the guard's own stays."""
        examples = examples_of(negatives, groups=groups)
        if examples.y is not None and examples.y.any():
            raise DataError(
                f"A threshold is set on negatives, and {int(examples.y.sum())} of {len(examples.y)} prompts are "
                "positive. Leave them out: contrast.where(label=0)."
            )
        self.require_fresh(examples, "threshold", ("fit", "calibrate"))
        scores = score(negatives)
        made = threshold_at(
            scores,
            target_fpr=target_fpr,
            confidence=confidence,
            groups=examples.groups if examples.grouped else None,
            tolerance=ROUNDING * torch.finfo(self.model.backend.dtype).eps * float(np.ptp(scores)),
        )
        if (distinct := len(set(examples.keys()))) < needed(target_fpr, confidence):
            warnings.warn(
                f"The {len(examples.prompts)} negatives are {distinct} different texts. Copies are evidence only where "
                "they were drawn as traffic draws them.",
                SmallSampleWarning,
                stacklevel=3,
            )
        self.use("threshold", examples)
        return replace(made, marked=examples.marked, fingerprint=self.model.fingerprint)

    def use(self, purpose: str, examples: Examples) -> None:
        """Record that the guard is made from these prompts too: "fit", "calibrate" or "threshold"."""
        self.seen = {**self.seen, purpose: self.seen.get(purpose, frozenset[str]()) | frozenset(examples.keys())}

    # ------------------------------------------------------------------------------------------------------- judging
    def decision_function(self, X: Shown) -> NDArray[np.float64]:
        """Scores, shape [n]; above 0 the probe takes the prompt for positive."""
        return self.decide(self.states(X))

    def predict_proba(self, X: Shown) -> NDArray[np.float64]:
        """Probabilities of the two classes, shape [n, 2]; calibrated where the guard is."""
        return self._probabilities(self.states(X))

    def predict(self, X: Shown) -> NDArray[np.int64]:
        """1 where a prompt is flagged, shape [n]: above the threshold, or above 0 where none is set."""
        return (self.decision_function(X) > self.boundary).astype(np.int64)

    def score(self, X: Shown, y: Labels | None = None) -> float:
        """Share of prompts that are judged as labelled."""
        return float(np.mean(self.predict(X) == examples_of(X, y).labels))

    def judge(self, X: Shown) -> list[Judgement]:
        """Everything the guard says, a prompt each."""
        return self.judge_rows(self.states(X))

    def judge_rows(self, rows: NDArray[np.float64]) -> list[Judgement]:
        """The same of rows as `states` gives them."""
        scores, probabilities = self.decide(rows), self._probabilities(rows)[:, 1]
        strange = np.zeros(len(rows), dtype=bool) if self.gate is None else self.gate.predict(rows) < 0
        limit = self.boundary
        return [
            Judgement(float(s), float(p), bool(s > limit), bool(odd and not s > limit), limit)
            for s, p, odd in zip(scores, probabilities, strange, strict=True)
        ]

    def token_scores(self, prompt: Item) -> TokenScores:
        """The score at every token. The guard decides at one of them; elsewhere it was not fitted."""
        shown = prompt_of(prompt)
        batch = self.model.tokens([shown])
        acts = self.model.capture([shown], sites=list(self.sites), where=ALL, batch_tokens=self.batch_tokens)
        rows = np.concatenate([acts.at(site).double().cpu().numpy() for site in self.sites], axis=1)
        position = int(batch.position(self.where)[0]) if self.where.single else -1
        return TokenScores(batch.texts[0], batch.offsets[0], tuple(map(float, self.decide(rows))), position)

    @property
    def boundary(self) -> float:
        """What scores are compared with: the threshold, or 0 where none is set."""
        return 0.0 if self.threshold is None else self.threshold.value

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is read.

        Raises:
            ConfigError: nothing yet.
        """
        if not self.layers:
            raise ConfigError("This guard is not fitted, so it has no layer to read. Call fit, or load one.")
        return _sites(self.stream, self.layers, self.model.spec)

    def states(self, X: Shown) -> NDArray[np.float64]:
        """The rows that the probe reads, shape [n, len(layers) * width]."""
        return self._rows(examples_of(X), self.sites)

    # ----------------------------------------------------------------------------------------------------- the record
    def describe(self) -> dict[str, Any]:
        """What the guard is, in plain values: model, probe, position, threshold."""
        return {
            "model": self.fitted_name,
            "fingerprint": self.fitted_on,
            "template": reading.template_key(self.model),
            "method": self.probe.method,
            "nuisance": self.nuisance,
            "stream": self.stream,
            "layers": list(self.layers),
            "n_layers": self.model.spec.n_layers,
            "where": str(self.where),
            "category": self.category,
            "threshold": None if self.threshold is None else asdict(self.threshold),
            "calibrated": None if self.calibration is None else self.calibration.method,
            "gated": self.gate is not None,
            "prompts": {use: len(keys) for use, keys in self.seen.items()},
        }

    def on(self: G, model: HookedModel) -> G:
        """The same guard reading another model of the same shape and chat template, such as a fine-tuned one.

        What it promises was measured on the first; `set_threshold` measures it anew.

        Raises:
            StaleStore: a model of another shape, or with another chat template.
        """
        reading.require_like(self.model.spec, reading.template_key(self.model), model)
        other = type(self)(model, stream=self.stream, layers=self.layers, where=self.where, category=self.category)
        vars(other).update({name: value for name, value in vars(self).items() if name != "model"})
        return other

    def refitted(self, rows: NDArray[np.float64], y: NDArray[np.generic], train: Contrast) -> LatentProbe:
        """The probe as it was fitted, with the nuisance it had, on other rows.

        Args:
            train: the prompts of the rows; the nuisance is one of its factors.

        Raises:
            ConfigError: the nuisance came as numbers, or is no factor of these prompts.
            DataError: what the method needs is not there, such as refused positives.
        """
        nuisance = None
        if self.nuisance is not None:
            if self.nuisance not in train.factors:
                raise ConfigError(
                    f"The guard was fitted with the nuisance {self.nuisance!r}, which is no factor of {train.name!r}: "
                    "it cannot be fitted anew on these prompts. Fit it with a factor's name, and give that factor."
                )
            nuisance = np.asarray(train.factors[self.nuisance])
        return _anew(self.probe).fit(rows, y, nuisance=nuisance)

    def require_unseen(self, X: Shown, purpose: str) -> None:
        """Check that the guard was not made from any of these prompts.

        Raises:
            DataError: some of them it was, with what for.
        """
        self.require_fresh(examples_of(X), purpose, tuple(USES))

    def require_fresh(self, examples: Examples, purpose: str, uses: Sequence[str]) -> None:
        """The same for some of what a guard is made with."""
        keys = examples.keys()
        for use in uses:
            again = [row for row, key in enumerate(keys) if key in self.seen.get(use, ())]
            if again:
                raise DataError(
                    f"{len(again)} of {len(keys)} prompts given to {purpose} are among those the guard was "
                    f"{USES[use]} (the first is prompt {again[0]}). What is measured on them promises nothing. "
                    "Give others; Contrast.split makes disjoint parts."
                )

    def _rows(self, examples: Examples, sites: Sequence[Site]) -> NDArray[np.float64]:
        if examples.acts is not None:
            key = self.model.fingerprint
            return reading.given_states(examples.acts, sites, self.where, key)
        return reading.states_of(self.model, examples.prompts, sites, self.where, batch_tokens=self.batch_tokens)

    def decide(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of rows as `states` gives them."""
        return self.probe.decision_function(rows)

    def _probabilities(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.calibration is None:
            return self.probe.predict_proba(rows)
        positive = self.calibration(self.decide(rows))
        return np.stack([1 - positive, positive], axis=1)

    def _asked(self, spec: ModelSpec) -> tuple[int, ...]:
        if isinstance(self.asked_layers, str):
            if self.asked_layers != "auto":
                raise ConfigError(f"layers={self.asked_layers!r} was given. Give 'auto', or numbers such as [12, 13].")
            return tuple(range(spec.n_layers))
        if not isinstance(self.asked_layers, Sequence) or not self.asked_layers:
            raise ConfigError(f"layers={self.asked_layers!r} was given. Give 'auto', or numbers such as [12, 13].")
        return tuple(sorted({Site(layer).resolve(spec.n_layers).layer for layer in self.asked_layers}))

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers)) or "not fitted"
        held = f"; {self.threshold}" if self.threshold else ""
        read = f"{self.stream} {layers} of {self.model.spec.name} at {self.where}"
        return f"LatentGuard({self.category}: {self.probe.method} on {read}{held})"


def _sites(stream: str, layers: Sequence[int], spec: ModelSpec) -> tuple[Site, ...]:
    return tuple(Site(layer, cast("Any", stream)).resolve(spec.n_layers) for layer in layers)
