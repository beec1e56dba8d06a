"""What a guard costs: its own pass, which ends at its layer, and scoring within a pass that is made anyway."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from subspace_probe.core.findings import Finding, Interval
from subspace_probe.core.prompts import Prompt
from subspace_probe.core.reports import Table
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.guard.classifier import GuardClassifier
from subspace_probe.linalg.resampling import bootstrap_statistic, percentile_interval

PROMPTS, REPEATS, WARM = 40, 3, 3


def latency_findings(guard: GuardClassifier, prompts: Sequence[Prompt], *, seed: int) -> tuple[list[Finding], Table]:
    """Times of single prompts in milliseconds, p50 and p95 over prompts.

    Three things are timed in turn for every prompt, in an order that changes, so that a busy machine slows all of
    them: the bare forward pass to the logits of the last token; the guard's own pass, which ends at its deepest layer;
    and the bare pass with the guard's states read and scored in it. All start from tokens.
    """
    times = measured_times(guard, prompts, seed=seed)
    n = len(times["bare"])
    added = times["in_pass"] - times["bare"]
    series = {"latency.bare": times["bare"], "latency.own_pass": times["own_pass"], "latency.in_pass.added": added}
    said = {
        "latency.bare": "the bare forward pass",
        "latency.own_pass": "the guard's own pass, which ends at its deepest layer",
        "latency.in_pass.added": "what scoring adds to a pass that is made anyway",
    }
    findings: list[Finding] = []
    rows: list[dict[str, Any]] = []
    for name, values in series.items():
        row: dict[str, Any] = {"what": name.removeprefix("latency.")}
        for short, quantile in (("p50", 0.5), ("p95", 0.95)):
            estimate, spread = _quantile(values, quantile, seed)
            claim = f"{said[name]}, milliseconds, {short} over prompts"
            findings.append(Finding(f"{name}.{short}", claim, estimate, spread, n=n))
            row |= {short: estimate, f"{short}_low": spread.low, f"{short}_high": spread.high}
        rows.append(row | {"n": n})
    depth = (max(guard.layers) + 1) / guard.model.spec.n_layers
    ratio, spread = _quantile(times["own_pass"] / times["bare"], 0.5, seed)
    note = f"its deepest layer is {max(guard.layers)} of {guard.model.spec.n_layers}: {depth:.3f} of the blocks"
    claim = "the guard's own pass as a share of the bare forward pass, median over prompts"
    findings.append(Finding("latency.own_pass.ratio", claim, ratio, spread, n=n, note=note))
    about = f"Milliseconds, single prompts, timed in turn on {guard.model.backend.device}."
    return findings, Table.of(rows, about)


def measured_times(
    guard: GuardClassifier, prompts: Sequence[Prompt], *, seed: int
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Milliseconds of each pass for at most forty prompts, the median of three times, by what was timed."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(prompts))[:PROMPTS]
    passes = {"bare": _bare, "own_pass": _own, "in_pass": _inside}
    times: dict[str, list[float]] = {name: [] for name in passes}
    with torch.no_grad():
        for turn, row in enumerate([*chosen[:WARM], *chosen]):
            batch, spent = guard.model.tokens([prompts[row]]), {name: list[float]() for name in passes}
            for i in rng.permutation(REPEATS * len(passes)):
                name = list(passes)[i % len(passes)]
                spent[name].append(_timed(passes[name], guard, batch))
            if turn >= min(WARM, len(chosen)):  # the first few warm caches
                for name, found in spent.items():
                    times[name].append(float(np.median(found)))
    return {name: np.array(found) for name, found in times.items()}


def _timed(run: Callable[[GuardClassifier, TokenBatch], None], guard: GuardClassifier, batch: TokenBatch) -> float:
    start = perf_counter()
    run(guard, batch)
    return 1000 * (perf_counter() - start)


def _bare(guard: GuardClassifier, batch: TokenBatch) -> None:
    made = guard.model.run(batch, logits_to_keep=0 if guard.model.spec.encoder else 1)
    if made.logits is not None:
        made.logits.float().cpu()  # waits for the device


def _own(guard: GuardClassifier, batch: TokenBatch) -> None:
    made = guard.model.run(batch, reads=guard.sites, where=guard.where, stop_after=guard.sites[-1])
    _score(guard, made.reads)


def _inside(guard: GuardClassifier, batch: TokenBatch) -> None:
    keep = 0 if guard.model.spec.encoder else 1
    made = guard.model.run(batch, reads=guard.sites, where=guard.where, logits_to_keep=keep)
    _score(guard, made.reads)
    if made.logits is not None:
        made.logits.float().cpu()


def _score(guard: GuardClassifier, reads: Any) -> None:
    states = torch.cat([reads[site].double().mean(0, keepdim=True) for site in guard.sites], dim=1)
    guard.decide(states.cpu().numpy())


def _quantile(values: Float64[np.ndarray, " n"], quantile: float, seed: int) -> tuple[float, Interval]:
    estimate = float(np.quantile(values, quantile))
    if len(values) < 2:
        return estimate, Interval(float("nan"), float("nan"), of="one prompt: no interval")
    drawn = bootstrap_statistic(
        lambda index: float(np.quantile(values[index.numpy()], quantile)), len(values), seed=seed
    )
    low, high = percentile_interval(drawn, 0.95)
    return estimate, Interval(low, high, of="prompts, bootstrap")
