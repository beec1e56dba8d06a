"""Every intervention of the package passes through the audit: two verdicts, an answer or a reason for each check."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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

    requests = sp.load_contrast("organism:chat/requests", split="test", n=384).where(framing=0).first_pairs(40)
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


@pytest.mark.slow
def test_the_budget_is_kept_and_what_it_left_out_is_named(audits) -> None:
    from subspace_probe.diagnostics.budgets import QUICK

    for report in audits.values():
        cost = report.tables["cost"].records()
        assert sum(row["times the measurement"] for row in cost[1:] if not row["left out"]) <= QUICK
        left = {row["check"] for row in cost if row["left out"].startswith("left out")}
        assert "permutation" not in left or report.finding("control.permutation").verdict == "not tested"
    assert any("left out for the budget" in f.note for f in audits["steer"].findings)
