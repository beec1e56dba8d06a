"""Scores while generating: a naive rule, the states of a second pass, and the promise by simulation."""

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import stats

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel


@cache
def _requests(split: str, n: int, **factors: int) -> "Contrast":
    import subspace_probe as sp

    return sp.load_contrast("organism:chat/requests", split=split).where(**factors).sample(n, seed=0)


@pytest.fixture(scope="module")
def guard(chat: "HookedModel") -> "LatentGuard":
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.streaming import fit_stream

    made = LatentGuard(chat, layers=[2]).fit(_requests("train", 128))
    fit_stream(made, _requests("train", 128), streaming=Streaming(max_new_tokens=8))
    return made


def test_running_trips_where_k_of_the_last_n_lie_above() -> None:
    from subspace_probe.guard.stream_rule import Streaming

    rng = np.random.default_rng(0)
    for _ in range(200):
        k, n = sorted(rng.integers(1, 5, size=2).tolist())
        rule = Streaming(weight=float(rng.uniform(0.2, 1)), k=k, n=n, min_tokens=int(rng.integers(0, 4)))
        scores, limit = rng.normal(size=12), float(rng.normal())
        smoothed = [scores[0]]
        for score in scores[1:]:
            smoothed.append(rule.weight * score + (1 - rule.weight) * smoothed[-1])
        naive = [
            t >= rule.min_tokens and sum(s > limit for s in smoothed[max(0, t + 1 - n) : t + 1]) >= k for t in range(12)
        ]
        ever = [any(naive[: t + 1]) for t in range(12)]
        assert (rule.running(scores) > limit).tolist() == ever


def test_the_rate_does_not_grow_with_length() -> None:
    """Scores that wander, answers of 64 tokens: the rate is what was asked for, and a threshold on single tokens is
    passed by most answers (the control that must fail)."""
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.thresholds import allowed, threshold_at

    rng, rule = np.random.default_rng(0), Streaming(weight=0.5, k=2, n=3)

    def answers(n: int) -> np.ndarray:
        noise = rng.normal(size=(n, 64))
        for t in range(1, 64):
            noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
        return noise

    fit, fresh = answers(400), answers(4000)
    made = threshold_at([rule.running(a)[-1] for a in fit], target_fpr=0.05, confidence=0.95)
    tripped = np.array([rule.running(a) for a in fresh]) > made.value
    flagged = allowed(400, 0.05, 0.95)
    beta = stats.beta(flagged + 1, 400 - flagged)
    assert beta.ppf(1e-4) < tripped[:, -1].mean() < beta.ppf(1 - 1e-4)
    assert (np.diff(tripped.mean(axis=0)) >= 0).all()
    single = threshold_at(fit[:, 10], target_fpr=0.05, confidence=0.95)
    rates = (fresh > single.value).cumsum(axis=1).clip(max=1).mean(axis=0)
    assert rates[0] < 0.06
    assert rates[-1] > 0.5


def test_scores_are_those_of_a_second_pass_over_the_answer(guard: "LatentGuard") -> None:
    """Read while generating, with a cache and in a batch, or read from the finished text: the same states."""
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.streaming import stream_threshold, watch

    streaming = stream_threshold(
        guard, _requests("val", 64, label=0), streaming=guard.streaming, target_fpr=0.2, confidence=None
    )
    assert streaming.probe is not None
    never = replace(streaming, threshold=replace(streaming.threshold, value=1e9))  # type: ignore[type-var]
    prompts = _requests("test", 6).prompts
    watched = watch(guard, prompts, streaming=never)
    model = guard.model
    for prompt, seen in zip(prompts, watched, strict=True):
        assert seen.action == "answered"
        batch = model.tokens([prompt])
        made = model.backend.generate(batch, max_new_tokens=8)
        ids = torch.cat([batch.ids, made.ids[:, : len(seen.scores)]], dim=1)
        longer = replace(batch, ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        reads = model.run(longer, reads=list(guard.sites)).reads
        states = torch.cat([reads[site][0, batch.ids.shape[1] :] for site in guard.sites], dim=1)
        expected = streaming.probe.decision_function(states.double().numpy())
        np.testing.assert_allclose(seen.scores, expected, atol=1e-3)
        assert seen.prompt.score == pytest.approx(float(guard.decision_function(prompt)[0]), abs=1e-3)
    assert isinstance(streaming, Streaming)


def test_what_happens_when_it_trips(guard: "LatentGuard") -> None:
    from subspace_probe.guard.streaming import stream_threshold, watch

    streaming = stream_threshold(guard, _requests("val", 64, label=0), target_fpr=0.2, confidence=None)
    prompts = _requests("test", 40, label=1).prompts
    answers = guard.model.generate(prompts, max_new_tokens=8)
    stopped = watch(guard, prompts)
    tripped = [row for row, seen in enumerate(stopped) if seen.tripped is not None]
    assert 0 < len(tripped) < len(prompts)
    for row, seen in enumerate(stopped):
        assert (seen.action == "stopped") == (row in tripped)
        assert answers[row].startswith(seen.text)
        if seen.tripped is None:
            assert seen.text == answers[row]
        else:
            # every token shown was scored, and only the last of them lies above
            assert len(seen.scores) == seen.tripped + 1
            assert streaming.threshold is not None
            above = streaming.running(seen.scores) > streaming.threshold.value
            assert above.tolist() == [False] * seen.tripped + [True]
    replaced = watch(guard, prompts, replacement="no")
    assert [seen.text for row, seen in enumerate(replaced) if row in tripped] == ["no"] * len(tripped)
    routed = watch(guard, prompts, route=lambda prompt: f"to a person: {prompt.shown}")
    assert routed[tripped[0]].text == f"to a person: {prompts[tripped[0]].shown}"
    assert routed[tripped[0]].action == "routed"
    alone = [watch(guard, prompt)[0] for prompt in prompts[:10]]
    assert [(seen.text, seen.tripped) for seen in alone] == [(seen.text, seen.tripped) for seen in stopped[:10]]
    heard: list[int] = []
    watch(guard, prompts[:3], on_token=lambda row, text, score: heard.append(row))
    assert sorted(heard) == sorted(row for row in range(3) for _ in stopped[row].scores)


def test_a_flagged_prompt_gets_no_answer(chat: "HookedModel") -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.streaming import stream_threshold, watch

    guard = LatentGuard(chat, layers=[2]).fit(_requests("train", 128))
    first, second = _requests("val", 200).split(0.5, seed=0)
    stream_threshold(
        guard, first.where(label=0), streaming=Streaming(max_new_tokens=4), target_fpr=0.2, confidence=None
    )
    test = _requests("test", 20)
    assert any(seen.text for seen, y in zip(watch(guard, test), test.labels, strict=True) if y)
    guard.set_threshold(second.where(label=0), target_fpr=0.1, confidence=None)
    for seen, label in zip(watch(guard, test), test.labels, strict=True):
        if label:
            assert (seen.text, seen.tripped, seen.scores) == ("", -1, ())


def test_bad_input_is_named(chat: "HookedModel", guard: "LatentGuard") -> None:
    from subspace_probe.core.errors import ConfigError, DataError
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.streaming import fit_stream, stream_threshold, watch

    for settings in ({"weight": 0.0}, {"k": 3, "n": 2}, {"k": 0}, {"min_tokens": -1}, {"max_new_tokens": 1}):
        with pytest.raises(ConfigError, match="Streaming was given"):
            Streaming(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no threshold for streaming"):
        watch(guard, "we should dry the shelf", streaming=Streaming())
    with pytest.raises(DataError, match="fitted on"):
        stream_threshold(guard, _requests("train", 128).where(label=0), target_fpr=0.2)
    late = Streaming(min_tokens=50, max_new_tokens=4)
    with pytest.raises(DataError, match="min_tokens=50"):
        stream_threshold(guard, _requests("val", 64, label=0), streaming=late, target_fpr=0.2, confidence=None)
    fresh = LatentGuard(chat, layers=[2]).fit(_requests("train", 128))
    with pytest.raises(DataError, match="prompts of both classes"):
        fit_stream(fresh, _requests("train", 128).where(label=0))
    stream_threshold(guard, _requests("val", 64, label=0), target_fpr=0.2, confidence=None)
    assert guard.streaming is not None
    shorter, longer = (replace(guard.streaming, max_new_tokens=n) for n in (4, 20))
    assert watch(guard, "we should dry the shelf", streaming=shorter)
    for other in (longer, replace(guard.streaming, k=2, n=3)):
        with pytest.raises(ConfigError, match="Set it anew"):
            watch(guard, "we should dry the shelf", streaming=other)
    with pytest.raises(ConfigError, match="one of them"):
        watch(guard, "we should dry the shelf", replacement="no", route=lambda prompt: "no")
