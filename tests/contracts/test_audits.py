"""Every intervention of the package passes through the audit: two verdicts, an answer or a reason for each check."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from subspace_probe.core.protocols import Intervention
    from subspace_probe.core.reports import Report

KINDS = ("patch", "whole patch", "steer", "ablate", "whole ablate", "knob", "half-space", "move")
VERDICTS = {"supported", "refuted", "inconclusive", "not tested", "unaudited"}


@pytest.fixture(scope="module")
def setting(chat):
    """Refusal in `chat`, at its planted place, and one intervention of every kind on it."""
    import subspace_probe as sp
    from subspace_probe.interventions.moves import Move
    from subspace_probe.interventions.targets import HalfSpace

    requests = sp.load_contrast("organism:chat/requests", split="test", n=384).where(framing=0).first_pairs(24)
    harmful, harmless = requests.sides()
    site, where = sp.Site(2), sp.T_POST_INST
    acts = chat.capture(requests, sites=site, where=where)
    found = sp.MeanDifference(null_draws=0).fit(acts, site)
    source = sp.Source.of(chat.capture(harmful, sites=site, where=where))
    mean = sp.Source.mean(acts)
    kinds: dict[str, Intervention] = {
        "patch": sp.Patch(source, where, found),
        "whole patch": sp.Patch(source, where),
        "steer": sp.Steer(found, where=where),
        "ablate": sp.Ablate(found),
        "whole ablate": sp.Ablate(sites=site, where=where, to=mean),
        "knob": sp.KnobClamp(found, float(found.coords(acts.at(site)).max()), where=where),
        "half-space": sp.Reroute(HalfSpace.of(found, margin=float(found.scale[0])), where=where),
        "move": sp.Reroute(Move.paired(acts, site, found), where=where),
    }
    return kinds, harmless, requests


@pytest.fixture(scope="module")
def audits(chat, setting) -> "dict[str, Report]":
    import subspace_probe as sp

    kinds, harmless, requests = setting
    return {
        name: sp.audit(chat, edit, harmless, "refusal_score", natural=requests, budget="quick")
        for name, edit in kinds.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gets_both_verdicts_and_an_answer_to_every_question(audits, name) -> None:
    from subspace_probe.diagnostics import CHECKS

    report = audits[name]
    assert [finding.name for finding in report.findings[:2]] == ["control", "mechanism"]
    assert {finding.verdict for finding in report.findings} <= VERDICTS
    for check in map(CHECKS.load, CHECKS):
        found = [f for f in report.findings if f.name.startswith(f"{check.line}.{check.name}")]
        assert found, check.name
        for finding in found:
            assert finding.note or finding.verdict != "not tested", finding
    if name.startswith("whole"):
        assert report.finding("mechanism").verdict == "not tested"
        assert "whole states" in report.finding("mechanism").note
    else:
        assert report.finding("mechanism").verdict == "supported", report.finding("mechanism")
        control = report.finding("control")
        # 40 random directions at every layer and token do not fit the budget, and the line says so
        assert control.verdict in (("not tested",) if name == "ablate" else ("supported", "refuted", "inconclusive"))
        assert name != "ablate" or "left out for the budget" in control.note


@pytest.fixture
def cost(chat, monkeypatch) -> "Callable[[Callable[[], object]], int]":
    """What a call runs, counted where passes are run, in tokens times blocks, and not by the plan's own estimates."""
    from subspace_probe.models.hooked import HookedModel

    layers, ran = chat.spec.n_layers, [0]
    run, prefix = HookedModel.run, HookedModel.prefix

    def counted_run(self, batch, **options):
        start = options.get("prefix")
        tokens = batch.ids.numel() if start is None else start.hidden.shape[0] * start.hidden.shape[1]
        ran[0] += tokens * (layers - (start.layer if start is not None else 0)) * (3 if options.get("grad") else 1)
        return run(self, batch, **options)

    def counted_prefix(self, batch, layer, **options):
        ran[0] += batch.ids.numel() * layer
        return prefix(self, batch, layer, **options)

    monkeypatch.setattr(HookedModel, "run", counted_run)
    monkeypatch.setattr(HookedModel, "prefix", counted_prefix)

    def counted(call) -> int:
        ran[0] = 0
        call()
        return ran[0]

    return counted


@pytest.mark.slow
def test_a_quick_audit_runs_less_than_twenty_measurements_and_names_what_it_left_out(chat, setting, cost) -> None:
    import subspace_probe as sp

    kinds, harmless, requests = setting
    alone = cost(lambda: sp.measure(chat, kinds["steer"], harmless, "refusal_score"))
    common = {"natural": requests, "neutral": harmless}
    quick = cost(lambda: sp.audit(chat, kinds["steer"], harmless, "refusal_score", budget="quick", **common))
    whole = cost(lambda: sp.audit(chat, kinds["steer"], harmless, "refusal_score", **common))
    assert quick < 20 * alone < whole
    report = sp.audit(chat, kinds["steer"], harmless, "refusal_score", budget=2.0, **common)
    left = [row["check"] for row in report.tables["cost"].records() if row["left out"].startswith("left out")]
    assert "specificity" in left
    assert "left out for the budget of 2" in report.finding("control.specificity").note


@pytest.mark.slow
@pytest.mark.parametrize(("check", "name"), [("random_controls", "random"), ("specificity", "specificity")])
def test_what_is_planned_is_what_is_run(chat, setting, cost, check, name) -> None:
    """Conditions that change the last tokens only are not planned as so many whole passes."""
    import subspace_probe as sp

    kinds, harmless, _ = setting
    steer, reports = kinds["steer"], list["Report"]()

    def audited(*checks: str) -> None:
        reports.append(sp.audit(chat, steer, harmless, "refusal_score", checks=checks, neutral=harmless))

    alone = cost(lambda: sp.measure(chat, steer, harmless, "refusal_score"))
    took = (cost(lambda: audited("integrity", check)) - cost(lambda: audited("integrity"))) / alone
    (row,) = reports[0].tables["cost"].where(check=name).records()
    assert 0.5 < row["times the measurement"] / took < 2, (row, took)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "fast"}, "budget='fast'"),
        ({"budget": -1.0}, "multiple of the cost"),
        ({"budget": float("nan")}, "multiple of the cost"),
        ({"margin": float("nan")}, "half-width"),
        ({"checks": "exchange"}, "Give a list of names"),
        ({"pairs": 1}, "at least two"),
    ],
)
def test_bad_settings_are_refused(chat, setting, options, says) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError

    kinds, harmless, requests = setting
    with pytest.raises(ConfigError, match=says):
        sp.audit(chat, kinds["steer"], harmless, "refusal_score", natural=requests, **options)
