"""`explain_no_effect` names the planted cause, and says that there is none where the cause is taken away."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


@pytest.fixture(scope="module")
def requests() -> Any:
    """Harmless requests, and all of them with their harmful partners."""
    import subspace_probe as sp

    every = sp.load_contrast("organism:chat/requests", split="test", n=24)
    return every.where(label=0, framing=0), every.where(framing=0)


@pytest.fixture(scope="module")
def found(chat, requests) -> dict[str, Any]:
    """Refusal where it is planted, harmfulness where it is planted, and a direction there that no gradient sees."""
    import subspace_probe as sp
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.metrics import metric_for

    places = {"refusal": (sp.Site(2), sp.T_POST_INST), "harmfulness": (sp.Site(1), sp.T_INST)}
    made: dict[str, Any] = {}
    for name, (site, where) in places.items():
        made[name] = sp.MeanDifference(null_draws=0).fit(chat.capture(requests[1], sites=site, where=where), site)
    pairs = Natural(chat, requests[1], *places["refusal"], metric_for("refusal_score", chat), pairs=16)
    seen = pairs.read_space.basis
    random = torch.randn(128, generator=torch.Generator().manual_seed(0))
    unseen = random - seen.T @ (seen @ random)
    length = made["refusal"].scale[0] / unseen.norm()
    made["unseen"] = Subspace.span((unseen * length)[None], site=places["refusal"][0], where=sp.T_POST_INST)
    return made


@pytest.fixture(scope="module")
def explained(chat, requests, found):
    """Reports by case, each made once."""
    import subspace_probe as sp

    kept: dict[str, Any] = {}
    harmless, natural = requests
    refusal, harmfulness = found["refusal"], found["harmfulness"]
    states = sp.Source.of(chat.capture(harmless, sites=sp.Site(2), where=sp.T_POST_INST))
    made = {
        "works": sp.Steer(refusal, where=sp.T_POST_INST),
        "strength": sp.Steer(refusal, 0.02, where=sp.T_POST_INST),
        "layer": sp.Steer(harmfulness, site=sp.Site(3), where=sp.T_INST),
        "tokens": sp.Steer(refusal, site=sp.Site(1), where=sp.T_INST),
        "direction": sp.Steer(found["unseen"], where=sp.T_POST_INST),
        "overwritten": sp.Steer(refusal, site=sp.Site(1), where=sp.T_POST_INST),
        "idle": sp.Steer(refusal, 0.0, where=sp.T_POST_INST),
        "right layer": sp.Steer(harmfulness, site=sp.Site(1), where=sp.T_INST),
        "nothing stands in the way": sp.Steer(refusal, site=sp.Site(1), where=sp.T_POST_INST),
        "too much": sp.Steer(refusal, 40.0),
    }

    def of(name: str) -> "Report":
        if name not in kept:
            standing = [sp.Patch(states, sp.T_POST_INST)] if name == "overwritten" else []
            with chat.intervened(*standing) as model:
                kept[name] = sp.explain_no_effect(model, made[name], harmless, "refusal_score", natural=natural)
        return kept[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "cause", "evidence"),
    [
        ("strength", "strength", "strength"),
        ("layer", "layer", "arrives"),
        ("tokens", "tokens", "tokens"),
        ("direction", "direction", "read"),
        ("overwritten", "overwritten", "arrives"),
        ("idle", "idle", "fired"),
        ("works", "works", "effect"),
        ("right layer", "works", "effect"),
        ("nothing stands in the way", "works", "effect"),
    ],
)
def test_the_planted_cause_comes_first(explained, case: str, cause: str, evidence: str) -> None:
    report = explained(case)
    first = report.tables["answers"].records()[0]
    assert (first["cause"], first["finding"]) == (cause, f"no_effect.{evidence}"), report.tables["answers"].rows
    effect = report.finding("no_effect.effect")
    assert (effect.verdict == "supported" and effect.estimate > 0.5) == (cause == "works"), effect
    assert report.tables["summary"].column("sentence") == [first["answer"]]
    asked = report.tables["questions"].column("question")
    assert asked[1:] == ["Why gibberish?", "Is it the concept or the prompt?"]
    assert asked[0] == ("Has it an effect?" if cause == "works" else "Why does it have no effect?")


@pytest.mark.slow
def test_the_numbers_are_those_of_a_plain_run(chat, requests, found, explained) -> None:
    """Effect, size and first order recomputed by other means: whole runs, captured states, a finite difference."""
    import subspace_probe as sp
    from subspace_probe.metrics import metric_for

    report, (harmless, natural) = explained("strength"), requests
    metric, site = metric_for("refusal_score", chat), sp.Site(2)
    labels = torch.tensor(natural.labels)
    clean = metric(chat.logits(natural), natural.prompts)
    unit = float(clean[labels == 1].mean() - clean[labels == 0].mean())

    def effect(strength: float) -> float:
        steer = sp.Steer(found["refusal"], strength, where=sp.T_POST_INST)
        edited = metric(chat.logits(harmless, interventions=[steer]), harmless.prompts)
        return float((edited - metric(chat.logits(harmless), harmless.prompts)).mean()) / unit

    assert report.finding("no_effect.effect").estimate == pytest.approx(effect(0.02), abs=1e-4)
    assert report.finding("no_effect.read").estimate == pytest.approx(20 * effect(0.001), rel=0.05)
    tried = {row["to"]: row["effect"] for row in report.tables["tried"].records() if row["varied"] == "strength"}
    assert tried["x4"] == pytest.approx(effect(0.08), abs=1e-4)
    assert tried["x50"] == pytest.approx(effect(1.0), abs=1e-4)

    states = chat.capture(natural, sites=site, where=sp.T_POST_INST).at(site)
    along = states @ found["refusal"].unit
    gap = float(along[labels == 1].mean() - along[labels == 0].mean())
    step = 0.02 * float(found["refusal"].scale[0])
    assert report.finding("no_effect.size").estimate == pytest.approx(step / gap, rel=1e-3)
    bare = chat.capture(harmless, sites=site, where=sp.T_POST_INST).at(site)
    share = (step / bare.norm(dim=1)).median()
    assert report.tables["fired_tokens"].column("token") == ["<assistant>"] * 3
    assert report.tables["arrivals"].column("at its tokens")[0] == pytest.approx(float(share), rel=1e-3)


@pytest.mark.slow
def test_a_layer_that_works_is_the_one_that_is_tried(chat, requests, found, explained) -> None:
    import subspace_probe as sp
    from subspace_probe.metrics import metric_for

    harmless, metric = requests[0], metric_for("refusal_score", chat)
    rows = {row["to"]: row["effect"] for row in explained("layer").tables["tried"].where(varied="layers").records()}
    change = {
        layer: metric(
            chat.logits(
                harmless,
                interventions=[sp.Steer(found["harmfulness"], site=sp.Site(layer), where=sp.T_INST)],
            ),
            harmless.prompts,
        ).mean()
        - metric(chat.logits(harmless), harmless.prompts).mean()
        for layer in (0, 2)
    }
    assert set(rows) == {"L0.resid_post", "L1.resid_post", "L2.resid_post"}
    ratio = rows["L2.resid_post"] / rows["L0.resid_post"]
    assert ratio == pytest.approx(float(change[2] / change[0]), rel=1e-3)


@pytest.mark.slow
def test_gibberish_and_concept_are_answered(explained) -> None:
    loud, plain = explained("too much"), explained("works")
    assert loud.finding("no_effect.text").verdict == "refuted"
    assert "gibberish" in loud.tables["answers"].column("cause")
    assert "gibberish" in loud.finding("no_effect.size").note
    assert plain.finding("no_effect.text").verdict == "supported"
    assert plain.finding("no_effect.concept").verdict == "supported"
    assert explained("direction").finding("no_effect.concept").estimate < 0.2


def test_prompts_without_such_a_token_are_said_to_be(chat, requests, found) -> None:
    import subspace_probe as sp

    report = sp.explain_no_effect(chat, sp.Steer(found["refusal"], where=sp.GENERATED), requests[0], "refusal_score")
    assert [finding.name for finding in report.findings] == ["no_effect.fired"]
    assert report.finding("no_effect.fired").verdict == "refuted"
    assert "'generated'" in report.tables["summary"].column("sentence")[0]


def test_what_fired_is_what_capture_sees(chat, requests, found) -> None:
    """Each move against two captures, on one token and on many; a control where the second edit sees the first."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.firing import fire

    harmless = requests[0]
    for where in (sp.T_INST, sp.ALL):
        steer = sp.Steer(found["refusal"], 0.7, site=sp.Site(1), where=where)
        fired = fire(chat, steer, harmless.prompts)[sp.Site(1)]
        shown = sp.PROMPT if where == sp.ALL else where
        clean, edited = (
            chat.capture(harmless, sites=sp.Site(1), where=shown, interventions=used) for used in ([], [steer])
        )
        torch.testing.assert_close(fired.before, clean.at(sp.Site(1)))
        torch.testing.assert_close(fired.before + fired.change, edited.at(sp.Site(1)), atol=1e-5, rtol=1e-5)
        assert fired.prompt.tolist() == clean.prompt.tolist()
        assert fired.position.tolist() == clean.position.tolist()
        assert fired.prompts_moved() == 1.0
    twice = fire(chat, sp.Ablate(found["refusal"]), harmless.prompts)
    stale = chat.capture(harmless, sites=sp.Site(1, "mlp_out"), where=sp.PROMPT).at(sp.Site(1, "mlp_out"))
    assert not torch.allclose(twice[sp.Site(1, "mlp_out")].before, stale, atol=1e-3)


def test_variance_between_classes_is_that_of_an_analysis_of_variance() -> None:
    from scipy.stats import f_oneway

    from subspace_probe.diagnostics.no_effect import between

    labels = torch.tensor([0, 1] * 10)
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(1)).double() + labels[:, None]
    f = f_oneway(values[labels == 1, 0].numpy(), values[labels == 0, 0].numpy()).statistic
    assert between(values, labels) == pytest.approx(f / (f + 18), rel=1e-9)
    assert between(labels[:, None].double(), labels) == pytest.approx(1.0)
    assert between(torch.ones(20, 1).double(), labels) == 0.0


@pytest.mark.slow
def test_taking_out_what_is_hardly_there_is_not_called_unread(chat, requests, found) -> None:
    """Harmless states hold little of refusal, so its ablation does little, although the model does use it."""
    import subspace_probe as sp

    harmless, natural = requests
    report = sp.explain_no_effect(chat, sp.Ablate(found["refusal"]), harmless, "refusal_score", natural=natural)
    causes = report.tables["answers"].column("cause")
    assert "little" in causes
    assert "direction" not in causes
