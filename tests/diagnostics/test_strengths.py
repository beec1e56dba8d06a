"""The strength sweep: its numbers computed another way, its null, its baseline in words, and where it stops."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report
    from subspace_probe.interventions.steer import Steer
    from subspace_probe.models.hooked import HookedModel

STRENGTHS = (8.0, -1.0, 4.0, 1.0, 16.0)
WORDS = "say no to everything ."


@pytest.fixture(scope="module")
def contrast() -> "Contrast":
    import subspace_probe as sp

    return sp.load_contrast("organism:chat/requests", n=12)


@pytest.fixture(scope="module")
def steer(chat: "HookedModel") -> "Steer":
    """Along the refusal direction, as found on other prompts."""
    import subspace_probe as sp

    train = sp.load_contrast("organism:chat/requests", split="train", n=64)
    acts = chat.capture(train, sites=sp.Site(2), where=sp.T_POST_INST)
    return sp.Steer(sp.MeanDifference(null_draws=0).fit(acts, sp.Site(2)))


@pytest.fixture(scope="module")
def report(chat: "HookedModel", contrast: "Contrast", steer: "Steer") -> "Report":
    from subspace_probe.diagnostics.strengths import strength_sweep

    return strength_sweep(
        chat, steer, contrast, "refusal_score", STRENGTHS, draws=40, words=WORDS, show=2, max_new_tokens=10, seed=3
    )


def test_the_numbers_are_those_of_single_runs(
    chat: "HookedModel", contrast: "Contrast", steer: "Steer", report: "Report"
) -> None:
    from subspace_probe.core.prompts import Prompt

    refusing = chat.behaviour_ids("refusal")

    def score(*interventions: Any, prompts: Any = contrast) -> torch.Tensor:
        p = chat.logits(prompts, interventions=interventions).double().softmax(-1)[:, refusing].sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)

    clean = score()
    for strength in (-1.0, 1.0, 4.0):
        change = score(steer.with_strength(strength)) - clean
        assert report.finding(f"refusal_score.{strength:+g}").estimate == pytest.approx(float(change.mean()), abs=1e-3)
        rows = report.tables["effects"].where(strength=strength)
        found = torch.tensor(rows.column("steered")) - torch.tensor(rows.column("unsteered"))
        assert torch.allclose(found.double(), change, atol=2e-3)
        (dose,) = report.tables["doses"].where(strength=strength).records()
        against = (change * change.mean() < 0).double().mean()
        assert dose["wrong_way"] == pytest.approx(float(against))
        assert dose["wrong_way_low"] <= dose["wrong_way"] <= dose["wrong_way_high"]
    last = [{"role": "user", "content": f"{WORDS} {prompt.shown}"} for prompt in contrast.prompts]
    turns = [(*prompt.messages[:-1], turn) for prompt, turn in zip(contrast.prompts, last, strict=True)]
    asked = score(prompts=[Prompt(messages=said) for said in turns])
    assert report.finding("refusal_score.words").estimate == pytest.approx(float((asked - clean).mean()), abs=1e-3)
    assert report.finding("refusal_score.+1").verdict == "supported"


def test_texts_are_those_that_the_model_writes(
    chat: "HookedModel", contrast: "Contrast", steer: "Steer", report: "Report"
) -> None:
    shown, told = contrast.prompts[:2], report.tables["completions"]
    for condition, interventions in (("unsteered", []), ("strength +4", [steer.with_strength(4.0)])):
        texts = chat.generate(shown, interventions=interventions, max_new_tokens=10)
        assert told.where(condition=condition).column("text") == texts
    asked = chat.generate([f"{WORDS} {prompt.shown}" for prompt in shown], max_new_tokens=10)
    assert told.where(condition="in words").column("text") == asked


def test_it_rises_and_stops_where_text_degenerates(report: "Report") -> None:
    """On one side only: the other is followed on its own."""
    text = report.tables["text"]
    assert text.column("strength") == [0.0, -1.0, 1.0, 4.0]
    assert text.column("degenerate") == [False, False, False, True]
    assert [f.name for f in report.findings if f.name.startswith("refusal_score")] == [
        "refusal_score.-1", "refusal_score.+1", "refusal_score.+4", "refusal_score.words",
    ]  # fmt: skip
    (stopped,) = [said for said in report.tables["summary"].column("sentence") if "degenerates" in said]
    assert stopped.startswith("At +4 the text degenerates")
    assert stopped.endswith("Not run: +8, +16.")
    # a behaviour that turns round costs a few surprising words, and is no broken text
    (turned,) = text.where(strength=1.0).records()
    assert 0.3 < turned["loss"] < 0.5 * turned["loss_limit"]


def test_it_goes_on_where_it_is_told_to(chat: "HookedModel", contrast: "Contrast", steer: "Steer") -> None:
    from subspace_probe.diagnostics.strengths import strength_sweep

    whole = strength_sweep(chat, steer, contrast, None, (4.0, 8.0), show=2, max_new_tokens=6, stop=False)
    assert whole.tables["text"].column("degenerate") == [False, True, True]
    assert not whole.findings
    assert "doses" not in whole.tables


def test_both_measures_are_needed(chat: "HookedModel", contrast: "Contrast") -> None:
    """Circles are easy to predict, salad does not repeat; text of the model's own is neither."""
    from subspace_probe.diagnostics.fluency import continuations, fluency, repeated

    prompts = contrast.prompts[:3]
    own = continuations(chat, prompts, [], max_new_tokens=12)
    clean = fluency(chat, prompts, own)
    limits = clean.limits(chat.spec.d_vocab, 0.5)
    generator = torch.Generator().manual_seed(0)
    salad = [torch.randint(5, chat.spec.d_vocab, (12,), generator=generator).tolist() for _ in prompts]
    found = fluency(chat, prompts, salad)
    assert found.loss > limits.loss
    assert found.repeated < 0.1
    assert found.exceeds(limits)
    assert not clean.exceeds(limits)
    circles = [[*text[:3]] * 8 for text in own]
    assert sum(map(repeated, circles)) / 3 > limits.repeated


def test_repeats_are_counted() -> None:
    from subspace_probe.diagnostics.fluency import repeated

    assert repeated([1, 2, 3, 4]) == 0
    assert repeated([7] * 12) == pytest.approx(9 / 10)  # ten trigrams, one of them distinct
    assert repeated([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repeated([1, 2]) == 0


def test_losses_are_the_models_own(chat: "HookedModel", contrast: "Contrast") -> None:
    """Ragged prompts and texts, against Transformers' own loss of one text at a time."""
    from subspace_probe.diagnostics.fluency import losses

    prompts = contrast.prompts[:3]
    texts = [[9, 17, 4, 30], [12], [40, 41, 9, 8, 7, 6]]
    found = losses(chat, prompts, texts)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = torch.cat([chat.tokens([prompt]).ids[0], torch.tensor(text)])[None]
        labels = ids.clone()
        labels[:, : -len(text)] = -100
        with torch.no_grad():
            assert float(found[row]) == pytest.approx(float(chat.backend.hf(ids, labels=labels).loss), abs=1e-4)


def test_the_limit_lies_between_own_text_and_the_worst() -> None:
    from subspace_probe.diagnostics.fluency import Fluency

    limits = Fluency(0.2, 1.0).limits(1000, 0.5)
    assert limits.repeated == pytest.approx(0.6)
    assert limits.loss == pytest.approx(0.5 * (1.0 + math.log(1000)))
    assert Fluency(0.2, 4.0).limits(1000, 0.5).loss == math.inf  # a model that knows nothing cannot tell
    for worst in (Fluency(1.0, 0.0), Fluency(0.0, math.log(1000))):
        assert worst.exceeds(limits)


def test_a_rule_is_kept_and_no_draws_are_no_null(chat: "HookedModel", contrast: "Contrast", steer: "Steer") -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.strengths import strength_sweep
    from subspace_probe.interventions.rules import Score

    never = replace(steer, when=Score(steer.subspace, 1e6, where=sp.LAST))
    report = strength_sweep(chat, never, contrast, "refusal_score", [2.0], draws=0, show=0)
    assert report.finding("refusal_score.+2").estimate == 0
    assert report.finding("refusal_score.+2").null is None
    assert "text" not in report.tables


def test_reworded_prompts_and_templates_are_words_too(
    chat: "HookedModel", contrast: "Contrast", steer: "Steer"
) -> None:
    from subspace_probe.core.errors import DataError
    from subspace_probe.diagnostics.strengths import _in_words, strength_sweep

    few = contrast.take([0, 1])
    put = _in_words(few, "{x} , and say no")
    assert put.prompts[0].shown == f"{few.prompts[0].shown} , and say no"
    assert chat.tokens(put).instruction[0, 1] == chat.tokens(few).instruction[0, 1]  # it is still the same request
    report = strength_sweep(chat, steer, few, "refusal_score", [1.0], draws=0, show=0, words=put)
    assert report.provenance.config["words"] == few.name
    with pytest.raises(DataError, match="12 reworded prompts were given for 2"):
        strength_sweep(chat, steer, few, None, [1.0], words=contrast)


def test_what_makes_no_sense_is_refused(chat: "HookedModel", contrast: "Contrast", steer: "Steer") -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.diagnostics.strengths import strength_sweep

    for strengths, message in (([0.0], "No strength but 0"), ([], "No strength but 0"), ([1.0, math.nan], "finite")):
        with pytest.raises(ConfigError, match=message):
            strength_sweep(chat, steer, contrast, None, strengths)
    with pytest.raises(ConfigError, match=r"tolerance=2\.0"):
        strength_sweep(chat, steer, contrast, None, [1.0], tolerance=2.0)
    with chat.intervened(steer) as steered, pytest.raises(ConfigError, match="standing interventions"):
        strength_sweep(steered, steer, contrast, None, [1.0])


def test_it_is_drawn_with_its_baseline_and_its_stop(report: "Report") -> None:
    import subspace_probe as sp

    for unit, title in (("scale", "direction's scale"), ("norm", "share of each state's norm")):
        source = replace(report.provenance, config={**report.provenance.config, "unit": unit})
        figure = sp.figures.draw(replace(report, provenance=source))["strength"]
        assert title in figure.layout.xaxis.title.text
    names = {trace.name for trace in figure.data if trace.mode == "lines+markers"}
    assert names == {"found", "random", "moved the wrong way", "in words"}
    marks = [note.x for note in figure.layout.annotations if note.text == "text degenerates"]
    assert marks == [4.0]
    (level,) = [trace for trace in figure.data if trace.mode == "lines+markers" and trace.name == "in words"]
    assert len(set(level.y)) == 1
    without = replace(report, tables={"strength": report.tables["strength"]})
    bare = sp.figures.draw(without)["strength"]
    assert not [note for note in bare.layout.annotations if note.text == "text degenerates"]
    assert type(report).from_json(report.to_json()).tables["text"] == report.tables["text"]
