"""What a guard's report is made of, on guards that read known numbers: each control unmasks what it is there for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.guard.numbers_guard import contrast_of, numbers_guard

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.measured import Measured
    from subspace_probe.models.hooked import HookedModel

WORDS = ("table", "chair", "lamp", "door", "shelf", "basket", "river", "stone", "field", "bread", "apple", "garden")


def measured(guard: Any, test: "Contrast", draws: int = 300) -> "Measured":
    from subspace_probe.guard.measured import Measured

    return Measured.of(guard, test, None, None, draws=draws, seed=0)


def by_name(findings: Sequence[Any]) -> dict[str, Any]:
    return {finding.name: finding for finding in findings}


def lengthy(n: int, seed: int) -> "Contrast":
    """Positives are longer on the whole; nothing else differs."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    sizes = rng.integers(4, 14, size=n) + 4 * y
    return contrast_of([" ".join(rng.choice(WORDS, size=size)) for size in sizes], y)


def keyed(n: int, seed: int) -> "Contrast":
    """Positives hold one of three words that negatives never do."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    texts = [
        " ".join(rng.permutation([*rng.choice(WORDS[3:], size=7), *(rng.choice(WORDS[:3], size=label))])) for label in y
    ]
    return contrast_of(texts, y)


def test_a_guard_that_reads_length_only_is_unmasked(chat: "HookedModel") -> None:
    from subspace_probe.guard.controls import length_control

    train, test = lengthy(200, 0), lengthy(2400, 1)
    noise = np.random.default_rng(3)

    def words(prompts: Sequence[Any]) -> Any:
        return [[len(prompt.text.split())] for prompt in prompts]

    fooled = measured(numbers_guard(chat, words, train), test)
    found = by_name(length_control(fooled, None)[0])
    assert found["control.length"].verdict == "refuted"
    assert found["control.length"].estimate == pytest.approx(fooled.ranked.curve().auroc()[0])
    assert found["control.length_matched"].verdict == "refuted"
    assert found["control.length_matched"].estimate == pytest.approx(0.5, abs=0.02)
    # the control: a guard that knows the labels is not unmasked by the same prompts
    truth = dict(
        zip((prompt.text for prompt in (*train.prompts, *test.prompts)), train.labels + test.labels, strict=True)
    )
    known = numbers_guard(chat, lambda prompts: [[truth[p.text] + 0.3 * noise.normal()] for p in prompts], train)
    assert by_name(length_control(measured(known, test), None)[0])["control.length_matched"].verdict == "supported"


def test_matched_prompts_have_the_same_lengths() -> None:
    from subspace_probe.guard.controls import matched

    rng = np.random.default_rng(0)
    y = np.arange(500) % 2 == 1
    lengths = rng.integers(3, 15, size=500) + 3 * y
    kept = matched(lengths, y, seed=0)
    sides = [np.bincount(lengths[kept][y[kept] == side], minlength=20) for side in (False, True)]
    assert (sides[0] == sides[1]).all()
    both = [np.bincount(lengths[y == side], minlength=20) for side in (False, True)]
    assert sum(sides[0]) == np.minimum(*both).sum()  # as many as there are


def test_a_guard_that_looks_for_words_is_unmasked(chat: "HookedModel") -> None:
    from subspace_probe.guard.baselines import BagOfWords
    from subspace_probe.guard.controls import keyword_control

    train, test = keyed(200, 0), keyed(300, 1)
    counts = numbers_guard(chat, lambda prompts: [[sum(w in p.text for w in WORDS[:3])] for p in prompts], train)
    fooled = measured(counts, test)
    bag = BagOfWords.fit(train.prompts, train.labels)
    assert bag is not None
    found = by_name(keyword_control(fooled, bag, WORDS[:3])[0])
    assert fooled.ranked.curve().auroc()[0] > 0.9
    assert found["control.keyword_masked"].verdict == "refuted"
    assert found["control.keyword_masked.bag_of_words"].verdict == "supported"
    # the control: words that do not matter take nothing from it
    assert by_name(keyword_control(fooled, bag, WORDS[6:9])[0])["control.keyword_masked"].verdict == "supported"
    absent = by_name(keyword_control(fooled, bag, ["nowhere"])[0])["control.keyword_masked"]
    assert absent.verdict == "not tested"


def test_replaced_words_leave_the_instruction_where_it_was() -> None:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.guard.masking import replaced

    prompt = Prompt(text="Wash it. Then WASH it, friend", instruction="WASH it", start=14)
    changed = replaced(prompt, {"wash": "scrub", "then": "so"})
    assert changed.text == "scrub it. so scrub it, friend"
    assert changed.instruction == "scrub it"
    assert changed.start == changed.text.rindex("scrub")
    assert changed.text.find(changed.instruction) != changed.start  # the first one is another
    turns = ({"role": "system", "content": "wash"}, {"role": "user", "content": "then wash"})
    chat = replaced(Prompt(messages=turns), {"wash": "dry"})
    assert [turn["content"] for turn in chat.messages] == ["dry", "then dry"]


def test_stand_ins_are_neutral_and_as_long() -> None:
    from subspace_probe.guard.baselines import BagOfWords
    from subspace_probe.guard.masking import keywords_of, stand_ins

    train = keyed(200, 0)
    bag = BagOfWords.fit(train.prompts, train.labels)
    assert bag is not None
    assert set(keywords_of(bag, 3)) == set(WORDS[:3])
    swaps = stand_ins(("lamp", "table"), bag)
    weight = dict(zip(bag.words, np.abs(bag.weights), strict=True))
    single = sorted(weight[word] for word in bag.words if " " not in word)
    assert all(weight[stand_in] <= np.median(single) for stand_in in swaps.values())
    assert all(abs(len(word) - len(stand_in)) <= 1 for word, stand_in in swaps.items())
    assert BagOfWords.fit([replace(train.prompts[0], text="?!")] * 2, [0, 1]) is None


def test_precision_is_what_a_count_of_many_prompts_says() -> None:
    from subspace_probe.guard.promises import precision

    rng = np.random.default_rng(0)
    positive = rng.random(2_000_000) < 0.01
    flagged = rng.random(2_000_000) < np.where(positive, 0.9, 0.02)
    assert precision(0.01, 0.9, 0.02) == pytest.approx(positive[flagged].mean(), abs=0.01)
    assert precision(0.01, 0.9, 0.01) == pytest.approx(0.009 / (0.009 + 0.0099))
    assert precision(0.5, 0.9, 0.02) > 0.97  # the control: at the test's own share it is another figure
    assert precision(0.01, 0.9, 0.0) == 1.0
    assert np.isnan(precision(0.01, 0.0, 0.0))


@pytest.mark.parametrize(("flagged", "verdict"), [(0, "supported"), (15, "inconclusive"), (60, "refuted")])
def test_a_promise_is_kept_or_broken_or_open(chat: "HookedModel", flagged: int, verdict: str) -> None:
    from subspace_probe.guard.promises import kept_promise
    from subspace_probe.guard.thresholds import Threshold

    guard = numbers_guard(chat, lambda prompts: [[len(p.text)] for p in prompts], lengthy(40, 0))
    guard.threshold = Threshold(0.0, 0.02, 0.95, 400, False, 3, 0.02)
    found = kept_promise(guard, "fpr", np.arange(600) < flagged, np.arange(600), seed=0)
    assert (found.verdict, found.null.high) == (verdict, 0.02)
    assert found.estimate == pytest.approx(flagged / 600)
    assert f"{flagged} of 600 prompts" in found.note
    # counted as the threshold counts: by group, and a group with one flagged prompt counts
    guard.threshold = replace(guard.threshold, grouped=True)
    grouped = kept_promise(guard, "fpr", np.arange(600) % 6 < (flagged > 0), np.arange(600) // 6, seed=0)
    assert grouped.estimate == (flagged > 0)
    guard.threshold = None
    assert kept_promise(guard, "fpr", np.arange(600) < 3, np.arange(600), seed=0).verdict == "unaudited"


def test_random_directions_do_not_know_the_class(chat: "HookedModel") -> None:
    from subspace_probe.guard.group_draws import GroupDraws
    from subspace_probe.guard.nulls import Nulls
    from subspace_probe.guard.ranked import AUROC

    train = lengthy(200, 0)
    rng, y = np.random.default_rng(0), np.array(train.labels) == 1
    guard = numbers_guard(chat, lambda prompts: rng.normal(size=(len(prompts), 3)), train)

    def states(seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(size=(200, 3)) * [0.01, 1, 1]
        return noise + np.outer(y, [10.0, 0, 0])

    rows = states(2)
    prompts = GroupDraws(y, np.arange(200))
    nulls = Nulls.of(guard, train, states(1), rows, prompts)
    found = nulls.along_random(AUROC, prompts)
    assert np.quantile(found, 0.975) < 0.8
    assert (found >= 0.5).all()  # of the better sign
    # the control: directions of the covariance of all states read the class nearly always
    centred = states(1) - states(1).mean(axis=0)
    drawn = np.random.default_rng(0).standard_normal((100, 200)) @ centred @ rows.T
    shares = [(row[y][:, None] > row[~y]).mean() for row in drawn]
    assert np.quantile(np.maximum(shares, 1 - np.array(shares)), 0.5) > 0.99
    assert len(nulls.shuffled) == 40


def test_shuffled_labels_of_well_separated_pairs_are_chance(chat: "HookedModel") -> None:
    from subspace_probe.guard.group_draws import GroupDraws
    from subspace_probe.guard.nulls import Nulls
    from subspace_probe.guard.ranked import AUROC

    pairs = tuple((np.arange(200) // 2).tolist())
    train = replace(lengthy(200, 0), pairs=pairs, groups=pairs)
    y = np.array(train.labels) == 1
    guard = numbers_guard(chat, lambda prompts: np.zeros((len(prompts), 2)), train)

    def states(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(200, 2)) * 0.1 + np.outer(y, [5.0, 0.0])

    nulls = Nulls.of(guard, train, states(1), states(2), GroupDraws(y, np.array(pairs)))
    found = [one.value(AUROC) for one in nulls.shuffled]
    assert max(abs(value - 0.5) for value in found) < 0.3
    # the control: by the true labels each shuffle finds the classes, one way round or the other
    true = [replace(one, prompts=GroupDraws(y, np.array(pairs))).value(AUROC) for one in nulls.shuffled]
    assert np.median([max(value, 1 - value) for value in true]) > 0.9


def test_a_source_is_left_out_of_the_fit_that_is_measured_on_it(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.guard.held_out import held_out_findings
    from subspace_probe.guard.nulls import Nulls

    source = {"source": tuple((np.arange(200) // 2 % 2).tolist())}
    train, test = (replace(lengthy(200, seed), factors=source) for seed in (0, 1))
    train = replace(
        train, labels=tuple(1 - y if s else y for y, s in zip(train.labels, train.factors["source"], strict=True))
    )
    rng = np.random.default_rng(0)
    drawn = [[clue % 2 + 0.1 * rng.normal(), rng.normal()] for clue in range(400)]
    clues = dict(zip((p.text for p in (*train.prompts, *test.prompts)), drawn, strict=True))
    guard = numbers_guard(chat, lambda prompts: [clues[p.text] for p in prompts], train)
    here = measured(guard, test)
    states = guard.states(train)
    nulls = Nulls.of(guard, train, states, here.rows, here.prompts)
    found = by_name(held_out_findings(here, train, states, "source", nulls))
    # in source 1 the training labels are turned around: fitted without it, the probe is right there
    assert found["auroc.held_out_source.1"].estimate > 0.95
    assert found["auroc.held_out_source.0"].estimate < 0.05  # fitted on the turned ones only
    with pytest.raises(UnknownName, match="factor 'sauce'"):
        held_out_findings(here, train, states, "sauce", nulls)


def test_two_guards_are_compared_on_the_same_draws(chat: "HookedModel") -> None:
    from scipy.stats import binom
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    from subspace_probe.guard.comparison import compare_guards

    train, test = lengthy(200, 0), lengthy(600, 1)
    truth = dict(zip((p.text for p in (*train.prompts, *test.prompts)), train.labels + test.labels, strict=True))

    def noisy(amount: float, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        drawn = {text: label + amount * rng.normal() for text, label in truth.items()}
        return numbers_guard(chat, lambda prompts: [[drawn[p.text]] for p in prompts], train)

    good, bad = noisy(0.4, 0), noisy(1.5, 1)
    report = compare_guards(good, bad, test, draws=300)
    y = np.array(test.labels)
    scores = [guard.decision_function(test) for guard in (good, bad)]
    gap = report.finding("difference.auroc")
    assert gap.estimate == pytest.approx(roc_auc_score(y, scores[0]) - roc_auc_score(y, scores[1]))
    assert gap.verdict == "supported"
    right = [(one > 0) == y for one in scores]
    first, second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    p = min(1.0, 2 * binom.cdf(min(first, second), first + second, 0.5))
    test_of = report.finding("mcnemar")
    assert test_of.estimate == first / (first + second)
    assert f"exact p = {p:.3g}" in test_of.note
    kappa = cohen_kappa_score(scores[0] > 0, scores[1] > 0)
    assert f"{kappa:.3f}" in report.finding("agreement").note
    assert report.finding("difference.tpr_0.001").verdict == "not tested"
    same = compare_guards(good, good, test, draws=300)  # the control: a guard is no better than itself
    assert same.finding("difference.auroc").verdict == "refuted"
    assert same.finding("mcnemar").verdict == "not tested"
    turned = compare_guards(bad, good, test, draws=300).finding("difference.auroc")
    assert turned.estimate == -gap.estimate
    assert turned.verdict == "refuted"


def test_another_template_is_read_at_the_same_word(chat: "HookedModel") -> None:
    from subspace_probe.core.prompts import Prompt, asking
    from subspace_probe.core.tokens import LAST, T_INST
    from subspace_probe.guard.controls import WRAPPER, bare

    turns = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "well . wash the lamp . now"})
    prompt = Prompt(messages=turns, instruction="wash the lamp")
    assert bare(prompt) == Prompt(text="well . wash the lamp", raw=True)

    def word(shown: Prompt, where: Any) -> int:
        batch = chat.tokens([shown])
        return int(batch.ids[0, batch.ids.shape[1] - int(batch.lengths[0]) + int(batch.position(where)[0])])

    assert word(prompt, T_INST) == word(bare(prompt), LAST) == word(asking(prompt, WRAPPER), T_INST)
    assert word(prompt, LAST) != word(bare(prompt), LAST)  # the control: the template's own last token is another


def test_words_are_replaced_until_a_bag_of_words_is_lost(chat: "HookedModel") -> None:
    from subspace_probe.guard.baselines import BagOfWords
    from subspace_probe.guard.controls import keyword_control

    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(300)]

    def drawn(n: int) -> "Contrast":
        y = np.arange(n) % 2
        telling = [rng.choice(words[150:] if label else words[:150], size=3) for label in y]
        return contrast_of([" ".join([*rng.choice(words[:150], size=9), *more]) for more in telling], y)

    train, test = drawn(400), drawn(200)
    guard = numbers_guard(chat, lambda prompts: [[len(p.text)] for p in prompts], train)
    bag = BagOfWords.fit(train.prompts, train.labels)
    assert bag is not None
    found = by_name(keyword_control(measured(guard, test), bag, "auto")[0])
    assert int(found["control.keyword_masked"].note.split()[0]) > 50
    few = by_name(keyword_control(measured(guard, test), bag, words[150:170])[0])  # the control: twenty are too few
    effect = "control.keyword_masked.bag_of_words"
    assert found[effect].estimate > 0.08 > few[effect].estimate
