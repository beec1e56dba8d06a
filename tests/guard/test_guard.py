"""The latent guard on the organism whose truth is known, on other models, and against what it must refuse."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.models.tiny import tiny
from tests.models.tiny import words as tokenizer

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel


@cache
def _requests(split: str, n: int | None = None, **factors: int) -> "Contrast":
    import subspace_probe as sp

    contrast = sp.load_contrast("organism:chat/requests", split=split).where(**factors)
    return contrast if n is None else contrast.sample(n, seed=0)


@pytest.fixture(scope="module")
def guard(chat: "HookedModel") -> "LatentGuard":
    """Fitted on the plain framing only."""
    from subspace_probe.guard.guard import LatentGuard

    return LatentGuard(chat).fit(_requests("train", 256, framing=0))


def _plain_guard(chat: "HookedModel") -> "LatentGuard":
    """One that a test may change."""
    from subspace_probe.guard.guard import LatentGuard

    return LatentGuard(chat, layers=[1]).fit(_requests("train", 96, framing=0))


@cache
def _override() -> "HookedModel":
    import subspace_probe as sp

    return sp.load_model("organism:override")


def _auroc(guard: "LatentGuard", contrast: "Contrast") -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(contrast.labels, guard.decision_function(contrast)))


# ------------------------------------------------------------------------------------------------------- what it finds
@pytest.mark.parametrize("method", ["centroid_cosine", "mean_difference", "lda", "logistic", "factor"])
def test_every_method_sees_through_framings_it_was_not_fitted_on(chat: "HookedModel", method: str) -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe

    layers = [0, 1, 2, 3] if method == "centroid_cosine" else [1]  # how they are chosen is tested below
    guard = LatentGuard(chat, LatentProbe(method), layers=layers).fit(_requests("train", 192, framing=0))
    for framing in range(3):
        test = _requests("test", framing=framing)
        scores, y = guard.decision_function(test), np.array(test.labels)
        assert _auroc(guard, test) >= 0.98
        limit = np.sort(scores[y == 0])[int(np.ceil(0.99 * (y == 0).sum())) - 1]
        assert (scores[y == 1] > limit).mean() >= 0.9


def test_shuffled_labels_give_nothing(chat: "HookedModel") -> None:
    """The control: a guard fitted to nothing finds nothing on requests with other words."""
    from subspace_probe.guard.guard import LatentGuard

    train = _requests("train", 256, framing=0)
    labels = np.random.default_rng(0).permutation(train.labels).tolist()
    guard = LatentGuard(chat, layers=[1]).fit(list(train.prompts), labels)
    assert abs(_auroc(guard, _requests("test", framing=0)) - 0.5) < 0.2


def test_the_layer_is_chosen_on_the_fit_data_alone(chat: "HookedModel", guard: "LatentGuard") -> None:
    """Scores are those of naive folds; a layer within one standard error of the best is taken if it is shallower."""
    from subspace_probe.guard.layer_choice import LayerScore, chosen_layer

    assert set(guard.layer_scores) == set(range(chat.spec.n_layers))
    assert guard.layers == (chosen_layer(guard.layer_scores),)
    near = {0: LayerScore(0.7, 0.01), 1: LayerScore(0.8, 0.01), 2: LayerScore(0.81, 0.015)}
    assert chosen_layer(near) == 1
    assert chosen_layer({**near, 2: LayerScore(0.81, 0.005)}) == 2


def test_layer_scores_are_those_of_a_naive_computation() -> None:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    from subspace_probe.guard.layer_choice import layer_scores
    from subspace_probe.guard.probe import LatentProbe

    rng = np.random.default_rng(0)
    y, groups = np.tile([0, 1], 60), np.repeat(np.arange(60), 2)
    rows = rng.normal(size=(120, 6))
    rows[:, 0] += 1.5 * y
    found = layer_scores(LatentProbe("mean_difference"), {7: rows}, y, groups, None, seed=3)[7]
    aurocs = []
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=3).split(rows, y, groups):
        w = rows[train][y[train] == 1].mean(0) - rows[train][y[train] == 0].mean(0)
        aurocs.append(roc_auc_score(y[test], rows[test] @ w))
    assert found.auroc == pytest.approx(np.mean(aurocs))
    assert found.error == pytest.approx(np.std(aurocs, ddof=1) / 5**0.5)


# ----------------------------------------------------------------------------------------------------- what it promises
def test_a_threshold_keeps_its_promise_on_fresh_negatives(guard: "LatentGuard") -> None:
    from scipy import stats

    guard.set_threshold(_requests("val", label=0), target_fpr=0.05, confidence=0.95)
    assert guard.threshold is not None
    test = _requests("test")
    flagged, y = guard.predict(test), np.array(test.labels)
    # not significantly above the target, at groups of three framings that share a request
    assert stats.binomtest(int(flagged[y == 0].sum() / 3), int((y == 0).sum() / 3), 0.05).pvalue > 1e-3
    assert flagged[y == 1].mean() >= 0.9
    assert guard.score(test) == pytest.approx((flagged == y).mean())
    assert [judged.flagged for judged in guard.judge(test)] == flagged.astype(bool).tolist()


def test_a_threshold_on_the_fit_negatives_breaks_its_promise() -> None:
    """Why they are refused: with as many features as rows, scores of the rows fitted on lie far from fresh ones."""
    from subspace_probe.guard.probe import LatentProbe
    from subspace_probe.guard.thresholds import threshold_at

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(600, 300)), np.tile([0, 1], 300)
    X[y == 1, 0] += 1
    probe = LatentProbe("logistic").fit(X, y)
    fresh = rng.normal(size=(5000, 300))
    wrong = threshold_at(probe.decision_function(X[y == 0]), target_fpr=0.02)
    assert (probe.decision_function(fresh) > wrong.value).mean() > 0.1
    right = threshold_at(probe.decision_function(rng.normal(size=(600, 300))), target_fpr=0.02)
    assert (probe.decision_function(fresh) > right.value).mean() < 0.02


def test_prompts_used_before_are_refused(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.guard.guard import LatentGuard

    train, val = _requests("train", 256, framing=0), _requests("val")
    guard = LatentGuard(chat, layers=[1]).fit(train)
    with pytest.raises(DataError, match="prompts given to threshold are among those the guard was fitted on"):
        guard.set_threshold(train.where(label=0), target_fpr=0.1)
    with pytest.raises(DataError, match="given to calibrate"):
        guard.calibrate(train)
    first, second = val.split(0.5, seed=0)
    guard.calibrate(first)
    with pytest.raises(DataError, match="calibrated on"):
        guard.set_threshold(val.where(label=0), target_fpr=0.1)
    # another writing of a prompt that was used is the same prompt
    text = next(p.shown for p, y in zip(train.prompts, train.labels, strict=True) if len(p.messages) == 1 and not y)
    with pytest.raises(DataError, match="1 of 1 prompts"):
        guard.set_threshold([f"  {text.upper()} "], target_fpr=0.5, confidence=None)
    with pytest.raises(DataError, match="positive"):
        guard.set_threshold(second, target_fpr=0.1)
    with pytest.raises(DataError, match="at least 299"):
        guard.set_threshold(second.where(label=0).take(range(40)))
    assert guard.threshold is None
    guard.set_threshold(second.where(label=0), target_fpr=0.2, confidence=None)
    with pytest.raises(DataError, match="used to set the threshold"):
        guard.require_unseen(second, "report")
    with pytest.raises(DataError, match="used to set the threshold"):
        guard.calibrate(second)
    with pytest.raises(DataError, match="calibrated on"):
        guard.fit_stream(first)


def test_groups_count_once(chat: "HookedModel", guard: "LatentGuard") -> None:
    """The three framings of one request are one piece of evidence."""
    negatives = _requests("val", label=0)
    guard.set_threshold(negatives, target_fpr=0.05)
    assert guard.threshold is not None
    assert (guard.threshold.grouped, guard.threshold.n) == (True, len(set(negatives.groups)))


def test_probabilities_are_calibrated_and_the_threshold_does_not_move(chat: "HookedModel") -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe

    guard = LatentGuard(chat, LatentProbe("mean_difference"), layers=[0]).fit(_requests("train", 256, framing=0))
    first, second = _requests("val").split(0.5, seed=0)
    guard.calibrate(first).set_threshold(second.where(label=0), target_fpr=0.1)
    test = _requests("test")
    before, predicted = guard.predict_proba(test), guard.predict(test)
    np.testing.assert_allclose(before.sum(axis=1), 1)
    guard.calibrate(first, method="isotonic")
    assert (guard.predict(test) == predicted).all()
    guard.calibration = None
    raw = guard.predict_proba(test)[:, 1]
    y = np.array(test.labels)
    assert ((before[:, 1] - y) ** 2).mean() < ((raw - y) ** 2).mean()


def test_a_prompt_that_the_threshold_rests_on_is_not_flagged_in_another_batch(chat: "HookedModel") -> None:
    """Copies of one prompt, as traffic has them, at the very order statistic: scores differ in their last digits from
    batch to batch, and without the tolerance some of the negatives themselves are flagged."""
    guard = _plain_guard(chat)
    prompts = [*_requests("val", label=0, framing=0).prompts[:90]]
    scores = guard.decision_function(prompts)
    copies = [prompts[int(np.argsort(scores)[-2])]] * 20
    guard.set_threshold([*prompts, *copies], target_fpr=0.1, confidence=None)
    held = guard.threshold
    assert held is not None
    assert held.tolerance > 0
    batches = [[prompt] for prompt in prompts] + [prompts[i : i + 7] for i in range(0, 90, 7)] + [prompts]
    alone = np.concatenate([guard.decision_function(copies[: i % 5 + 1] + prompts[: 3 * i]) for i in range(12)])
    assert abs(alone - held.value).min() < 2 * held.tolerance
    for batch in batches:
        batched = guard.decision_function([*batch, copies[0]])
        assert not batched[-1] > held.value
    assert held.tolerance < 1e-4 * np.ptp(scores)


def test_a_threshold_holds_for_the_model_it_was_set_on(chat: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.errors import StaleStore
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.interventions.relearning import relearn

    guard = _plain_guard(chat)
    asked = _requests("train", 8, framing=0).map(lambda prompt: replace(prompt, answer="sure", foil=None))
    tuned = relearn(chat, asked.prompts, steps=2)
    moved = guard.on(tuned).set_threshold(_requests("val", label=0), target_fpr=0.1)
    moved.save(tmp_path)
    assert LatentGuard.load(tmp_path, tuned).threshold == moved.threshold
    with pytest.raises(StaleStore, match="has its threshold from"):
        LatentGuard.load(tmp_path, chat)
    assert moved.describe()["model"] == "organism:chat"
    with pytest.raises(StaleStore, match="layers of width"):
        guard.on(_override())


def test_copies_are_named_and_groups_are_in_words(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import SmallSampleWarning

    guard = _plain_guard(chat)
    with pytest.warns(SmallSampleWarning, match="1 different text"):
        guard.set_threshold(["please dry the shelf"] * 60, target_fpr=0.05)
    assert "share of groups" not in str(guard.threshold)
    guard.set_threshold(_requests("val", label=0), target_fpr=0.05)
    assert "share of groups with a false positive <= 0.05" in str(guard.threshold)


def test_a_refit_keeps_the_nuisance(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe

    train = _requests("train", 128)
    guard = LatentGuard(chat, "factor", layers=[2]).fit(train, nuisance="refused")
    rows, y = guard.states(train), np.array(train.labels)
    np.testing.assert_array_equal(guard.refitted(rows, y, train).coef_, guard.probe.coef_)
    assert abs(LatentProbe("factor").fit(rows, y).coef_ - guard.probe.coef_).max() > 1e-3
    numbers = LatentGuard(chat, "factor", layers=[2]).fit(train, nuisance=list(map(float, train.factors["refused"])))
    with pytest.raises(ConfigError, match="is no factor"):
        numbers.refitted(rows, y, train)


# ------------------------------------------------------------------------------------------------------ what it reads
def test_a_batch_is_judged_as_each_prompt_alone(guard: "LatentGuard") -> None:
    test = _requests("test", 48)
    together = guard.decision_function(test)
    alone = np.array([guard.decision_function(prompt)[0] for prompt in test.prompts])
    # scores here have a standard deviation of about 20, and the model computes in single precision
    np.testing.assert_allclose(together / together.std(), alone / together.std(), atol=1e-5)
    states = guard.states(test)
    single = np.concatenate([guard.states(prompt) for prompt in test.prompts])
    np.testing.assert_allclose(states, single, atol=1e-5)


def test_texts_prompts_chats_contrasts_and_activations_are_one(chat: "HookedModel", guard: "LatentGuard") -> None:
    import subspace_probe as sp

    test = _requests("test", 64, framing=0)
    bare = [row for row, p in enumerate(test.prompts) if len(p.messages) == 1 and p.instruction == p.shown]
    test = test.take(bare)
    expected = guard.decision_function(test)
    texts = [prompt.shown for prompt in test.prompts]
    assert len(test) >= 10
    chats: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    for shown in (texts, chats, test.prompts, list(test.prompts)):
        np.testing.assert_allclose(guard.decision_function(shown), expected, atol=1e-9)
    acts = chat.capture(test, sites=list(guard.sites), where=sp.T_INST, dtype=None)
    np.testing.assert_allclose(guard.decision_function(acts), expected, atol=1e-12)


def test_activations_read_elsewhere_or_from_another_model_are_refused(
    chat: "HookedModel", guard: "LatentGuard"
) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import SiteError, StaleStore

    test = _requests("test", 16, framing=0)
    with pytest.raises(StaleStore, match="reads 't_inst', and these activations are of 't_post_inst'"):
        guard.decision_function(chat.capture(test, sites=list(guard.sites), where=sp.T_POST_INST))
    base = sp.load_model("organism:chat-base")
    with pytest.raises(StaleStore, match="another model"):
        guard.decision_function(base.capture(test, sites=list(guard.sites), where=sp.T_INST))
    with pytest.raises(SiteError):
        guard.decision_function(chat.capture(test, sites=sp.resid_pre(), where=sp.T_INST))


def test_the_pass_ends_at_the_layer_that_is_read(guard: "LatentGuard", monkeypatch: pytest.MonkeyPatch) -> None:
    """No block above runs: what the guard costs is its depth."""
    run: list[int] = []
    blocks = guard.model.backend.blocks
    hooks = [block.register_forward_pre_hook(lambda *_, i=i: run.append(i)) for i, block in enumerate(blocks)]
    try:
        guard.predict(["we should dry the shelf tomorrow"])
    finally:
        for hook in hooks:
            hook.remove()
    assert max(run) == guard.layers[-1]
    assert guard.layers[-1] < len(blocks) - 1


def test_token_scores_are_the_score_where_it_decides(guard: "LatentGuard") -> None:
    prompt = _requests("test", 2).prompts[0]
    tokens = guard.token_scores(prompt)
    assert tokens.scores[tokens.position] == pytest.approx(float(guard.decision_function(prompt)[0]), abs=1e-3)
    assert len(tokens.spans) == len(tokens.scores)
    start, stop = tokens.spans[tokens.position]
    assert prompt.instruction is not None
    assert prompt.instruction.endswith(tokens.text[start:stop].strip())


@pytest.mark.parametrize("variant", ["bert", "gpt2", "gemma2"])
def test_it_sits_on_any_model_the_package_loads(variant: str) -> None:
    """An encoder is read at the mean over its tokens, a base model at its last token; a word decides the label."""
    import subspace_probe as sp
    from subspace_probe.guard.guard import LatentGuard

    model = sp.load_model(tiny(variant), tokenizer=tokenizer())
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(3, 40)]
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 5))) for _ in range(160)]
    y = np.tile([0, 1], 80)
    texts = [f"{text} {'w50' if label else 'w60'}" for text, label in zip(texts, y, strict=True)]
    guard = LatentGuard(model).fit(texts[:120], y[:120])
    assert str(guard.where) == ("all" if variant == "bert" else "last")
    assert guard.score(texts[120:], y[120:]) > 0.8
    if variant == "bert":
        naive = model.capture(texts[120:121], sites=list(guard.sites), where=sp.ALL)
        np.testing.assert_allclose(guard.states(texts[120:121])[0], naive.at(guard.sites[0]).mean(0), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ gate and files
def test_the_gate_abstains_and_never_decides(chat: "HookedModel") -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.residual_gate import ResidualGate

    train = _requests("train", 512, framing=0)
    bare = LatentGuard(chat, layers=[2]).fit(train)
    gated = LatentGuard(chat, layers=[2], gate=ResidualGate(0.9)).fit(train)
    strange = ["verb verb verb", "the the the the"]
    test = [*_requests("test", 60, framing=0).prompts, *strange]
    assert [j.flagged for j in gated.judge(test)] == [j.flagged for j in bare.judge(test)]
    judged = gated.judge(test)
    assert not any(j.abstained and j.flagged for j in judged)
    negatives = [j for j, label in zip(judged, _requests("test", 60, framing=0).labels, strict=False) if not label]
    assert np.mean([j.abstained for j in negatives]) < 0.2
    assert not any(j.abstained for j in bare.judge(test))


def test_saved_and_loaded_equals_the_original_exactly(chat: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.guard.probe import LatentProbe
    from subspace_probe.guard.residual_gate import ResidualGate
    from subspace_probe.guard.stream_rule import Streaming
    from subspace_probe.guard.streaming import fit_stream

    train, (first, second) = _requests("train", 128), _requests("val", 320).split(0.5, seed=0)
    for method, calibration in (("centroid_cosine", "isotonic"), ("lda", "sigmoid"), ("factor", "temperature")):
        guard = LatentGuard(chat, LatentProbe(method), gate=ResidualGate(), category="unkind")
        guard.fit(train, nuisance=None if method == "lda" else "refused")
        guard.calibrate(first, method=calibration).set_threshold(second.where(label=0), target_fpr=0.1)
        if method == "lda":
            fit_stream(guard, train.sample(32, seed=0), streaming=Streaming(max_new_tokens=4))
        guard.save(tmp_path / method)
        loaded = LatentGuard.load(tmp_path / method, chat)
        test = _requests("test", 64)
        assert loaded.judge(test) == guard.judge(test)
        np.testing.assert_array_equal(loaded.predict_proba(test), guard.predict_proba(test))
        assert loaded.describe() == guard.describe()
        assert loaded.seen == guard.seen
        assert loaded.layer_scores == guard.layer_scores
    assert {path.name for path in (tmp_path / "lda").iterdir()} == {"guard.json", "guard.safetensors"}


def test_a_guard_for_another_model_or_template_is_refused(
    chat: "HookedModel", guard: "LatentGuard", tmp_path: Path
) -> None:
    import copy

    import subspace_probe as sp
    from subspace_probe.core.errors import StaleStore, StoreError
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.interventions.relearning import relearn

    guard.save(tmp_path / "guard")
    asked = _requests("train", 8, framing=0).map(lambda prompt: replace(prompt, answer="sure", foil=None))
    tuned = relearn(chat, asked.prompts, steps=2)
    with pytest.raises(StaleStore, match="other weights"):
        LatentGuard.load(tmp_path / "guard", tuned)
    loaded = LatentGuard.load(tmp_path / "guard", tuned, allow_model_mismatch=True)
    test = _requests("test", 64)
    np.testing.assert_array_equal(loaded.decision_function(test), guard.on(tuned).decision_function(test))
    assert abs(loaded.decision_function(test) - guard.decision_function(test)).max() > 0.01
    assert _auroc(loaded, test) >= 0.95
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<assistant>"
    other = sp.load_model(chat.backend.hf, tokenizer=tokenizer)
    for allow in (False, True):
        with pytest.raises(StaleStore, match="another chat template"):
            LatentGuard.load(tmp_path / "guard", other, allow_model_mismatch=allow)
    with pytest.raises(StaleStore, match="layers of width"):
        LatentGuard.load(tmp_path / "guard", sp.load_model("organism:override"), allow_model_mismatch=True)
    with pytest.raises(StoreError, match="No guard in"):
        LatentGuard.load(tmp_path, chat)
    (tmp_path / "guard" / "guard.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match="Cannot read the guard's numbers"):
        LatentGuard.load(tmp_path / "guard", chat)
    (tmp_path / "guard" / "guard.json").write_text("[]")
    with pytest.raises(StoreError, match="not a guard"):
        LatentGuard.load(tmp_path / "guard", chat)


def test_a_failed_save_leaves_nothing(chat: "HookedModel", tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError, StoreError
    from subspace_probe.guard.guard import LatentGuard

    with pytest.raises(ConfigError, match="not fitted"):
        LatentGuard(chat).save(tmp_path / "guard")
    assert not (tmp_path / "guard").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="it is a file"):
        LatentGuard(chat, layers=[1]).fit(_requests("train", 32, framing=0)).save(tmp_path / "file")


def test_bad_input_is_named(chat: "HookedModel", guard: "LatentGuard") -> None:
    from subspace_probe.core.errors import ConfigError, DataError, PositionError, SiteError, UnknownName
    from subspace_probe.guard.examples import prompt_of
    from subspace_probe.guard.guard import LatentGuard

    train = _requests("train", 64, framing=0)
    with pytest.raises(SiteError):
        LatentGuard(chat, layers=[9])
    with pytest.raises(ConfigError, match="numbers such as"):
        LatentGuard(chat, layers=[])
    with pytest.raises(ConfigError, match="no_such"):
        LatentGuard(chat, "no_such", layers=[1]).fit(train)
    named = LatentGuard(chat, layers=[1]).fit(train, groups=[f"source {i // 2}" for i in range(64)])
    np.testing.assert_array_equal(named.predict(list(train.prompts)), named.predict(train))
    with pytest.raises(ConfigError, match="not fitted"):
        LatentGuard(chat).predict(["a shelf"])
    with pytest.raises(DataError, match="without labels"):
        LatentGuard(chat, layers=[1]).fit([p.shown for p in train.prompts])
    with pytest.raises(DataError, match="prompts of both classes"):
        LatentGuard(chat, layers=[1]).fit(train.where(label=0))
    with pytest.raises(DataError, match="y has 2"):
        LatentGuard(chat, layers=[1]).fit(train.prompts, [0, 1])
    with pytest.raises(DataError, match="Labels"):
        LatentGuard(chat, layers=[1]).fit(["a shelf", "the rice"], [1, 2])
    with pytest.raises(UnknownName, match="refused"):
        LatentGuard(chat, layers=[1]).fit(train, nuisance="refusd")
    for empty in ([], ()):
        with pytest.raises(DataError, match="no prompts"):
            guard.predict(empty)
    with pytest.raises(DataError, match="empty"):
        guard.predict([" "])
    with pytest.raises(DataError, match="to be judged"):
        prompt_of([])
    with pytest.raises(DataError, match="context"):
        guard.predict(["shelf " * 400])
    raw = [replace(prompt, messages=(), text=prompt.shown, raw=True, instruction=None) for prompt in train.prompts[:2]]
    with pytest.raises(PositionError, match="t_inst"):
        guard.predict(raw)
