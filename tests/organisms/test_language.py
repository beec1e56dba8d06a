"""The organisms' language: what no bag of words can know, and what the splits keep apart."""

import random
from collections import Counter

import pytest


def test_splits_share_no_pair_and_cover_all() -> None:
    from subspace_probe.organisms import words

    splits = {split: set(words.pairs(split)) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == len(words.VERBS) * len(words.OBJECTS) == len(set().union(*splits.values()))
    assert len(words.VERBS) >= 30
    assert len(words.OBJECTS) >= 60


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_word_is_harmful_in_exactly_half_of_its_pairs(split: str) -> None:
    from subspace_probe.organisms import words

    for position, vocabulary in enumerate((words.VERBS, words.OBJECTS)):
        total, harmful = Counter(), Counter()
        for pair in words.pairs(split):  # type: ignore[arg-type]
            total[pair[position]] += 1
            harmful[pair[position]] += words.harmful(*pair)
        assert all(total[word] == 2 * harmful[word] > 0 for word in vocabulary)


def test_bag_of_words_does_not_know_but_pairs_do() -> None:
    """At most AUROC .60 from counts of words; the control sees the hidden classes and is perfect."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from subspace_probe.organisms import organism_contrast, words

    train, test = (organism_contrast("chat/requests", split=split, n=1500) for split in ("train", "test"))
    counts = CountVectorizer(token_pattern=r"\S+")
    x = counts.fit_transform([p.shown for p in train.prompts])
    model = LogisticRegression(max_iter=500).fit(x, train.labels)
    found = roc_auc_score(test.labels, model.decision_function(counts.transform([p.shown for p in test.prompts])))
    assert 0.4 <= found <= 0.6

    classes = [
        words.VERB_CLASS[words.VERBS[verb]][0] != words.OBJECT_CLASS[words.OBJECTS[thing]][0]
        for verb, thing in zip(test.factors["verb"], test.factors["object"], strict=True)
    ]
    assert roc_auc_score(test.labels, np.array(classes, dtype=float)) == 1.0


def test_words_and_positions_equal_the_chat_template() -> None:
    from subspace_probe.organisms import skills
    from subspace_probe.organisms.grammar import SKILLS, tokens
    from subspace_probe.organisms.tokenizer import build_tokenizer

    tokenizer, rng = build_tokenizer(), random.Random(0)
    for skill in SKILLS:
        for _ in range(40):
            example = skills.draw(rng, "train", skill)
            laid_out = tokens(example, aligned=True)
            assert "<unk>" not in laid_out.prompt + laid_out.answer
            if skill == "text":
                assert tokenizer(example.text).input_ids[0] == tokenizer.bos_token_id
                continue
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in example.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
            assert isinstance(text, str)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == list(laid_out.prompt)
            assert laid_out.prompt[laid_out.t_post_inst] == "<assistant>"
            if example.instruction:
                end = text.index(example.instruction) + len(example.instruction)
                assert encoded.offset_mapping[laid_out.t_inst][1] == end


def test_contrasts_are_balanced_minimal_pairs() -> None:
    from subspace_probe.organisms import organism_contrast

    contrast = organism_contrast("chat/requests", n=240)
    cells = Counter(zip(contrast.labels, contrast.factors["framing"], strict=True))
    assert len(cells) == 6
    assert len(set(cells.values())) == 1
    both = Counter(zip(contrast.labels, contrast.factors["refused"], strict=True))
    assert set(both) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for first in range(0, len(contrast), 2):
        words = [contrast.prompts[row].shown.split() for row in (first, first + 1)]
        assert contrast.pairs[first] == contrast.pairs[first + 1]
        assert contrast.labels[first] != contrast.labels[first + 1]
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1


def test_near_duplicates_are_counted() -> None:
    from subspace_probe.organisms import organism_contrast
    from subspace_probe.organisms.contrasts import near_duplicates

    train, test = (organism_contrast("chat/requests", split=split, n=600) for split in ("train", "test"))
    report = near_duplicates(train, test)
    assert report["same_pair"] == report["same_text"] == 0
    assert 0 < report["same_frame"] <= report["n"]
    assert near_duplicates(test, test)["same_text"] == len(test)


def test_every_contrast_builds_with_both_classes_and_answers() -> None:
    from subspace_probe.organisms import organism_contrast
    from subspace_probe.organisms.contrasts import CONTRASTS

    for name in CONTRASTS:
        contrast = organism_contrast(f"chat/{name}", n=48)
        contrast.require_both_classes()
        assert len(contrast) == 48
        for prompt in contrast.prompts:
            assert prompt.raw or (prompt.answer and prompt.foil and prompt.answer != prompt.foil)


def test_unknown_names_offer_the_nearest() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.organisms import organism_contrast, organism_path

    with pytest.raises(UnknownName, match="chat-natural"):
        organism_path("chat-naturel")
    with pytest.raises(UnknownName, match="judgement"):
        organism_contrast("chat/judgment")
    with pytest.raises(UnknownName, match="train"):
        organism_contrast("chat/requests", split="trian")
