"""Which layers must be patched for the answer to become the source's: found in few runs, by two binary searches.

Minder et al. 2024 (Controllable Context Sensitivity and the Knob Behind It), arXiv:2411.07404.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError, PositionError, ShapeError
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import LAST, Where
from subspace_probe.interventions.patch import Patch
from subspace_probe.interventions.patchscope import ReadOut, TokenIdentity
from subspace_probe.interventions.path_patch import Component, component
from subspace_probe.interventions.sources import Source
from subspace_probe.models.hooked import HookedModel, PromptsLike, as_prompts

PUBLISHED = TokenIdentity()


@final
@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What a search found.

    Attributes:
        stream: what was patched in each layer.
        where: the token it was patched at.
        start: first layer of the range [start, stop); None where no range reached the threshold.
        stop: the layer behind the range; 0 where the answer is the source's before anything is patched.
        added: later layers that the refinement added, in its order.
        separated: whether in the end the source's answer is more likely than the target's by more than `eps`, at the
            last depth that was read.
        source: mean probability of the source's answer at each depth read, with `layers` patched, or with all layers
            where none were found, shape [depth].
        target: of the target's own answer.
        clean_source: of the source's answer with nothing patched.
        clean_target: of the target's own answer with nothing patched.
        runs: patched runs that the search took.
        scan_runs: patched runs that checking took besides.
        monotone: whether, over all upper and all lower bounds, what holds for some layers holds for more of them, as
            binary search assumes; None where it was not checked.
        exceptions: the ranges [start, stop) at which it does not.
    """

    stream: Component
    where: Where
    start: int | None
    stop: int | None
    added: tuple[int, ...]
    separated: bool
    source: Float[Tensor, " depth"]
    target: Float[Tensor, " depth"]
    clean_source: Float[Tensor, " depth"]
    clean_target: Float[Tensor, " depth"]
    runs: int
    scan_runs: int
    monotone: bool | None
    exceptions: tuple[tuple[int, int], ...]

    @property
    def reached(self) -> bool:
        """Whether some range of layers makes the source's answer likely enough."""
        return self.stop is not None

    @property
    def layers(self) -> tuple[int, ...]:
        """What must be patched, ascending; empty where nothing needs to be, or nothing helps."""
        if self.start is None or self.stop is None:
            return ()
        return tuple(sorted((*range(self.start, self.stop), *self.added)))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The same as sites, for a patch."""
        return tuple(Site(layer, self.stream) for layer in self.layers)

    def __repr__(self) -> str:
        found = f"layers {', '.join(map(str, self.layers)) or 'none'}" if self.reached else "threshold never reached"
        order = {None: "not checked", True: "monotone"}.get(self.monotone, f"not monotone at {list(self.exceptions)}")
        return (
            f"LayerSearch({self.stream} at {self.where}: {found}; p(source) {float(self.clean_source[-1]):.2f} to "
            f"{float(self.source[-1]):.2f}, p(target) {float(self.clean_target[-1]):.2f} to "
            f"{float(self.target[-1]):.2f}; {self.runs} runs; {order})"
        )


def search_layers(
    model: HookedModel,
    source_prompts: PromptsLike,
    target_prompts: PromptsLike,
    *,
    stream: str = "attn_out",
    where: Where = LAST,
    readout: ReadOut = PUBLISHED,
    threshold: float = 0.85,
    eps: float = 0.3,
    phi: float = 0.05,
    max_added: int | None = None,
    scan_up_to: int = 16,
    batch_tokens: int = 8192,
) -> LayerSearch:
    """The layers whose attention (or MLP) output must come from the source, for the answer to become the source's.

    1. The smallest `stop` such that patching the layers [0, stop) makes the source's answer likelier than `threshold`
       at some depth that is read, by binary search.
    2. The largest `start` such that [start, stop) still does, by binary search.
    3. As long as the source's answer does not lead by more than `eps` at the last depth, the first later layer in
       which its probability falls by more than `phi` is patched too, for it writes the target's answer again.

    That is one run for every halving and one for every layer added, all layers of a set in one run. Probabilities are
    means over the prompts. Both binary searches assume that patching more layers only helps, which MLPs and norms can
    break: `monotone` says whether it holds here.

    What is found depends on which prompts are source and target. With a contrast whose pairs differ in the intent
    alone, such as ``knob = sp.load_contrast("organism:chat/knob")``, where label 1 answers from the note (the context)
    and label 0 from memory (the prior), and with ``context = [p for p, y in zip(knob.prompts, knob.labels) if y]`` and
    ``prior`` likewise, the four settings of the paper are:

    * CP, context to prior: ``search_layers(model, context, prior)``, and PC: ``search_layers(model, prior, context)``.
      Only the intent differs, so these are the layers in which the intent is taken up, and all that follows from it.
    * PRIOR: ``search_layers(model, prior[1:] + prior[:1], prior)``, and CTX likewise with `context`. The intent is the
      same and the questions differ, so these are the layers in which the answer is written. Leave out rows whose
      answers happen to agree.

    Args:
        source_prompts: whose states are put in, each with its `answer`.
        target_prompts: what is run, each with its `answer`; as many, in the same order.
        stream: "attn_out", as published, or "mlp_out".
        where: one token a prompt; the last, as published.
        readout: how probable an answer is: `TokenIdentity()`, in each layer's state, as published, or
            `FinalProbability()`, at the output. Only the former shows where an answer is lost again, so only then can
            layers be added.
        threshold: .85 as published, which took .85 to .90.
        eps: .3 as published, and .2 once.
        phi: .05 as published.
        max_added: at most so many layers are added; as many as there are by default.
        scan_up_to: models of at most so many layers are scanned over all bounds, to see whether the order assumed
            holds; 0 never does.
        batch_tokens: how many tokens, pads included, one pass that reads the source's states may have.

    Raises:
        DataError: numbers of prompts that differ, a prompt without an answer, or a pair whose answers begin with the
            same token and so cannot be told apart.
        ConfigError: a setting out of range, or an encoder, which gives no answers.
        PositionError: several tokens a prompt.
        ShapeError: a read-out that returns something else than probabilities.
    """
    most = model.spec.n_layers if max_added is None else max_added
    _require_settings(model, where, {"threshold": threshold, "eps": eps, "phi": phi}, most)
    sources, targets = as_prompts(source_prompts), as_prompts(target_prompts)
    shown = _asked(model, sources, targets)
    n_layers, searched = model.spec.n_layers, component(stream)
    acts = model.capture(
        sources, sites=[Site(layer, searched) for layer in range(n_layers)], where=where, batch_tokens=batch_tokens
    )

    def measure(sets: Sequence[tuple[int, ...]]) -> Tensor:
        return _measured(model, shown, readout, [_patch(acts, layers, searched, where) for layers in sets])

    runs = _Runs(measure, threshold)
    clean = runs(())
    start, stop = _range(runs, n_layers)
    kept = tuple(range(n_layers)) if start is None or stop is None else tuple(range(start, stop))
    added = _refined(runs, kept, eps, phi, most) if stop else ()
    final = runs((*kept, *added))
    used = runs.count
    exceptions = _exceptions(runs, n_layers, start, stop) if n_layers <= scan_up_to else None
    return LayerSearch(
        stream=searched,
        where=where,
        start=start,
        stop=stop,
        added=added,
        separated=_leads(final, eps),
        source=final[:, 0],
        target=final[:, 1],
        clean_source=clean[:, 0],
        clean_target=clean[:, 1],
        runs=used,
        scan_runs=runs.count - used,
        monotone=None if exceptions is None else not exceptions,
        exceptions=exceptions or (),
    )


@final
class _Runs:
    """Runs with some layers patched, each made once.

    Args:
        measure: mean probabilities of the source's and the target's answer for each set, shape [set, depth, 2].
        threshold: from where on an answer counts as the source's.
    """

    def __init__(self, measure: Callable[[Sequence[tuple[int, ...]]], Tensor], threshold: float) -> None:
        self._measure, self._threshold = measure, threshold
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, layers: Sequence[int]) -> Float[Tensor, "depth 2"]:
        self.make([layers])
        return self._seen[tuple(sorted(layers))]

    def make(self, sets: Sequence[Sequence[int]]) -> None:
        """Those not made yet, together."""
        new = list(dict.fromkeys(key for layers in sets if (key := tuple(sorted(layers))) not in self._seen))
        if new:
            self._seen.update(zip(new, self._measure(new), strict=True))

    def reach(self, start: int, stop: int) -> bool:
        """Whether patching [start, stop) makes the answer the source's at some depth."""
        return bool(self(range(start, stop))[:, 0].max() > self._threshold)

    @property
    def count(self) -> int:
        """How many were made in which anything was patched."""
        return sum(1 for layers in self._seen if layers)


def _range(runs: _Runs, n_layers: int) -> tuple[int, int] | tuple[None, None]:
    """Steps 1 and 2."""
    if runs.reach(0, 0):
        return 0, 0
    if not runs.reach(0, n_layers):
        return None, None
    stop = _bisected(n_layers, lambda count: runs.reach(0, count))
    return stop - _bisected(stop, lambda count: runs.reach(stop - count, stop)), stop


def _bisected(high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number above 0 for which something holds that holds for `high` and not for 0."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _refined(runs: _Runs, kept: tuple[int, ...], eps: float, phi: float, most: int) -> tuple[int, ...]:
    """Step 3. A layer is added once at most, so it ends, whatever the probabilities do."""
    added: list[int] = []
    while len(added) < most and not _leads(now := runs((*kept, *added)), eps):
        falls = (now[:-1, 0] - now[1:, 0] > phi).tolist()
        later = range(kept[-1] + 1, len(now))
        lost = [layer for layer in later if falls[layer - 1] and layer not in added]
        if not lost:
            break
        added.append(lost[0])
    return tuple(added)


def _leads(values: Float[Tensor, "depth 2"], eps: float) -> bool:
    return bool(values[-1, 0] > values[-1, 1] + eps)


def _exceptions(runs: _Runs, n_layers: int, start: int | None, stop: int | None) -> tuple[tuple[int, int], ...]:
    """The ranges at which the order that binary search assumes does not hold, by running all of them."""
    expected = {(0, count): stop is not None and count >= stop for count in range(1, n_layers + 1)}
    if start is not None and stop is not None:
        expected |= {(first, stop): first <= start for first in range(1, stop)}
    runs.make([range(*bounds) for bounds in expected])
    return tuple(bounds for bounds, wanted in expected.items() if runs.reach(*bounds) != wanted)


def _patch(acts: Activations, layers: Sequence[int], stream: Component, where: Where) -> Patch | None:
    return Patch(Source.of(acts, *(Site(layer, stream) for layer in layers)), where) if layers else None


def _measured(
    model: HookedModel, prompts: Sequence[Prompt], readout: ReadOut, patches: Sequence[Patch | None]
) -> Float[Tensor, "condition depth 2"]:
    """Means over the prompts of what a read-out gives."""
    found = readout(model, prompts, patches)
    wanted = len(patches), 2, len(prompts)
    if (
        found.ndim != 4
        or (found.shape[0], *found.shape[2:]) != wanted
        or found.shape[1] not in (1, model.spec.n_layers)
    ):
        raise ShapeError(
            f"The read-out gave shape {tuple(found.shape)} for {wanted[0]} conditions and {wanted[2]} prompts. Give "
            "[condition, depth, 2, prompt], with one depth or one for each layer."
        )
    if not bool(((found >= 0) & (found <= 1)).all()):  # false for what is not a number, too
        raise ShapeError("The read-out gave numbers that are not between 0 and 1. Give probabilities.")
    return found.double().mean(-1)


def _asked(model: HookedModel, sources: Sequence[Prompt], targets: Sequence[Prompt]) -> list[Prompt]:
    """The targets, to be answered as their sources are: `answer` is the source's, `foil` their own.

    Raises:
        DataError: see `search_layers`.
    """
    if len(sources) != len(targets):
        raise DataError(
            f"{len(sources)} source prompts were given for {len(targets)} targets. Give one for each, in order."
        )
    for role, prompts in (("source", sources), ("target", targets)):
        if missing := [row for row, prompt in enumerate(prompts) if not prompt.answer]:
            raise DataError(
                f"{len(missing)} {role} prompts have no answer; the first is number {missing[0]}: "
                f"{prompts[missing[0]].shown[:60]!r}. Give each its 'answer'."
            )
    shown = [replace(own, answer=other.answer, foil=own.answer) for other, own in zip(sources, targets, strict=True)]
    words = sorted({word for prompt in shown for word in (prompt.answer, prompt.foil) if word})
    ids = dict(zip(words, model.token_ids(words), strict=True))
    shared = [row for row, p in enumerate(shown) if p.answer and p.foil and ids[p.answer] == ids[p.foil]]
    if shared:
        first = shown[shared[0]]
        raise DataError(
            f"Source and target answers begin with the same token in {len(shared)} of {len(shown)} pairs (rows "
            f"{', '.join(map(str, shared[:10]))}), so they cannot be told apart; the first is {first.answer!r} and "
            f"{first.foil!r}. Leave these rows out."
        )
    return shown


def _require_settings(model: HookedModel, where: Where, probabilities: Mapping[str, float], most: int) -> None:
    if model.spec.encoder:
        raise ConfigError(f"{model.spec.family} is an encoder and gives no answers. Use a decoder model.")
    if not where.single:
        raise PositionError(f"The search patches one token a prompt, not {str(where)!r}. Use last or t_inst.")
    for name, value in probabilities.items():
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ConfigError(f"{name} is {value}. It is a probability: give 0 or more, and less than 1.")
    if most < 0:
        raise ConfigError(f"max_added is {most}. Give 0 to add no layers, or None for as many as there are.")
