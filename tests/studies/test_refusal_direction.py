"""The study against what is known to be true of the organism, and against the published tables."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report
    from subspace_probe.finders.published_selection import Candidate
    from subspace_probe.models.hooked import HookedModel

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "refusal_direction"
MODELS = ("gemma-2b-it", "meta-llama-3-8b-instruct", "qwen-1_8b-chat")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("refusal_direction", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


ABOVE = {
    "planted_cosine.refusal": 0.85,
    "refusal_rate.harmful": 0.95,
    "refusal_rate.added": 0.95,
    "side_effect.accuracy.ablated": -0.03,
}
BELOW = {
    "refusal_rate.harmless": 0.05,
    "refusal_rate.ablated": 0.10,
    "refusal_rate.weights": 0.10,
    "refusal_rate.subtracted": 0.15,
    "refusal_rate.added_random": 0.05,
    "weights.difference": 1e-4,
    "side_effect.kl.ablated": 0.1,
    "side_effect.cross_entropy.ablated": 0.05,
    "side_effect.own_text.ablated": 0.05,
}


@pytest.mark.slow
def test_the_planted_direction_is_found_ablated_added_and_taken_out_of_the_weights(report: "Report") -> None:
    for name, bound in ABOVE.items():
        assert report.finding(name).estimate >= bound, name
    for name, bound in BELOW.items():
        assert report.finding(name).estimate <= bound, name
    for name in (*ABOVE, *BELOW, "refusal_rate.ablated_random"):
        assert report.finding(name).verdict == "supported", report.finding(name)
    assert (
        report.finding("refusal_rate.ablated_random").estimate >= 0.95
    )  # no direction but this one takes refusal away
    assert not report.failures()


@pytest.mark.slow
def test_the_verdicts_of_the_audit(report: "Report") -> None:
    for name in ("ablation.control", "ablation.mechanism", "addition.control"):
        assert report.finding(name).verdict == "supported", report.finding(name)


@pytest.mark.slow
def test_that_nothing_survives_in_four_layers_is_said(report: "Report") -> None:
    """Refusal is planted at the input of layer 3, which the published cut leaves out of a model of 4."""
    found = report.finding("selection.survivors")
    assert (found.estimate, found.verdict) == (0.0, "refuted")
    chosen = report.tables["selection"].where(chosen=True).records()
    assert [(row["position"], row["layer"], row["kept"]) for row in chosen] == [(-1, 3, False)]
    assert "leaves no candidate" in report.tables["summary"].column("sentence")[0]


@pytest.mark.slow
def test_weights_equal_ablation_at_run_time(report: "Report", chat: "HookedModel") -> None:
    """Again by hand, on the model's own matrices; weights without another direction differ."""
    from copy import deepcopy

    import subspace_probe as sp
    from subspace_probe.core.sites import resid_pre
    from subspace_probe.core.tokens import LAST
    from subspace_probe.organisms import organism_contrast

    train, test = (organism_contrast("chat/harmfulness", split=part, n=64) for part in ("train", "test"))
    acts = chat.capture(train, sites=resid_pre(3), where=LAST)
    direction = sp.MeanDifference(null_draws=0).fit(acts, acts.sites[0])
    hf = deepcopy(chat.backend.hf)
    unit = direction.unit.double()
    with torch.no_grad():
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone())
        embedding = hf.model.embed_tokens.weight
        embedding -= (embedding.double() @ unit[:, None] @ unit[None]).float()
        for layer in hf.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight -= (unit[:, None] @ (unit[None] @ weight.double())).float()
    batch = chat.tokens(test.prompts)
    last = batch.lengths - 1 if bool(batch.mask[:, 0].all()) else torch.full((len(test),), batch.ids.shape[1] - 1)
    with torch.no_grad():
        by_hand = hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[torch.arange(len(test)), last]
    from subspace_probe.interventions.conditions import condition_logits

    ablated, untouched = condition_logits(chat, test.prompts, [sp.Ablate(direction), None])
    assert float((by_hand - ablated).abs().max()) < 1e-4
    assert float((by_hand - untouched).abs().max()) > 1.0
    null = report.finding("weights.difference").null
    assert null is not None
    assert null.low > 1e-2


@pytest.mark.slow
def test_control_a_direction_that_is_not_the_models_own_fails(chat: "HookedModel") -> None:
    """The mean difference of layer 1 at the same token: expectations are unmet, and the verdicts say so."""
    import subspace_probe as sp
    from subspace_probe.core.sites import resid_pre
    from subspace_probe.core.tokens import LAST
    from subspace_probe.diagnostics.trials import trial
    from subspace_probe.metrics import metric_for
    from subspace_probe.organisms import organism_contrast
    from subspace_probe.studies.refusal_direction import _rates
    from subspace_probe.studies.refusal_direction_tables import planted_finding

    train, test = (organism_contrast("chat/harmfulness", split=part, n=80) for part in ("train", "test"))
    acts = chat.capture(train, sites=resid_pre(1), where=LAST)
    wrong = sp.MeanDifference(null_draws=0).fit(acts, acts.sites[0])
    metric, harmful, harmless = metric_for("refusal_score", chat), test.where(label=1), test.where(label=0)
    trials = {
        "ablated.harmful refused": trial(chat, harmful, sp.Ablate(wrong), metric, draws=40),
        "added.harmless refused": trial(chat, harmless, sp.Steer(wrong), metric, draws=40),
        "subtracted.harmful refused": trial(chat, harmful, sp.Steer(wrong, -1.0), metric, draws=40),
    }
    found = {finding.name: finding for finding in (*_rates(trials), *planted_finding(chat, wrong, train, 0))}
    for name in ("refusal_rate.ablated", "refusal_rate.added", "planted_cosine.refusal"):
        assert not found[name].met, found[name]
        assert found[name].verdict != "supported", found[name]
    assert found["refusal_rate.ablated"].verdict == found["refusal_rate.added"].verdict == "refuted"


@pytest.mark.slow
def test_the_report_survives_json_and_draws(report: "Report") -> None:
    import subspace_probe as sp

    again = sp.Report.from_json(report.to_json())
    assert again.findings == report.findings
    assert set(sp.figures.draw(again)) == {"selection", "strength", "nulls", "tokens"}
    for finding in report.findings:
        assert finding.verdict in ("supported", "refuted", "inconclusive", "not tested"), finding
        assert finding.n > 0 or finding.verdict == "not tested", finding


def _candidate(layer: int, bypass: float, induce: float, kl: float) -> "Candidate":
    from subspace_probe.finders.published_selection import Candidate

    return Candidate(-1, layer, bypass, induce, kl)


def test_the_nearest_candidate_where_nothing_survives() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies.refusal_direction_tables import choose, selection_finding

    early, late = _candidate(1, 5.0, -5.0, 0.0), _candidate(3, -4.0, 6.0, 0.01)
    harmful = _candidate(2, -9.0, 9.0, 0.5)  # the largest difference, and too much harm
    broken = _candidate(0, float("nan"), 50.0, 0.0)
    assert choose([early, late, harmful, broken], 4) == (late, ())
    assert choose([harmful], 4) == (harmful, ())
    assert "taken instead" in selection_finding([early, late, harmful], 4).note
    # control: one that survives is taken by the published rule, whatever the difference of another
    kept = _candidate(2, -1.0, 0.5, 0.1)
    assert choose([early, late, harmful, kept], 4) == (kept, (kept,))
    assert selection_finding([late, kept], 4).verdict == "supported"
    with pytest.raises(ConfigError, match="None of 1 candidates has scores"):
        choose([broken], 4)


@pytest.mark.parametrize("model", MODELS)
def test_the_published_tables_give_the_published_pick(model: str) -> None:
    from subspace_probe.finders.published_selection import Candidate
    from subspace_probe.studies.refusal_direction_tables import choose

    folder = PUBLISHED / model
    if not folder.is_dir():
        pytest.skip("the published tables are not in ../shared/data: this check against them needs them")
    rows = json.loads((folder / "direction_evaluations.json").read_text())
    keys = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
    pick, kept = choose([Candidate(*(row[key] for key in keys)) for row in rows], 1 + max(r["layer"] for r in rows))
    wanted = json.loads((folder / "direction_metadata.json").read_text())
    assert (pick.position, pick.layer) == (wanted["pos"], wanted["layer"])
    assert len(kept) == len(json.loads((folder / "direction_evaluations_filtered.json").read_text()))


def test_too_few_prompts_cannot_show_that_accuracy_is_kept() -> None:
    """No loss among 20 prompts leaves room for one of three points; among 200 it does not."""
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.findings import Interval
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.studies.refusal_direction_tables import _cost

    def verdict(values: torch.Tensor) -> str:
        prompts = Contrast("skills", tuple(Prompt(text=str(i)) for i in range(len(values))), (0,) * len(values))
        return _cost("side_effect.accuracy.ablated", "skills", values, Interval(0.0, 0.0), prompts, 0).verdict

    assert verdict(torch.zeros(20)) == "inconclusive"
    assert verdict(torch.zeros(200)) == "supported"
    assert verdict(-(torch.arange(200) < 60).double()) == "refuted"


def test_a_model_that_always_complies_has_no_refusal_to_find() -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("refusal_direction")
    with pytest.raises(ConfigError, match="complies with all"):
        study.run(sp.load_model("organism:chat-base"), study.Config(n_train=48, n_validation=48, n_test=48))
