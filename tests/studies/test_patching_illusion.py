"""The study against what is known to be true of the organism."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.studies.notebooks import Executed, execute

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report
    from subspace_probe.models.hooked import HookedModel


@pytest.fixture(scope="module")
def ioi() -> "HookedModel":
    import subspace_probe as sp

    return sp.load_model("organism:ioi")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    return execute("patching_illusion", tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def report(executed: Executed) -> "Report":
    return executed.report


@pytest.mark.slow
def test_the_notebook(executed: Executed) -> None:
    executed.check()


@pytest.mark.slow
def test_the_bars(report: "Report") -> None:
    """At the MLP an illusion, in the stream the model's own, and an edit that equals its patch."""
    assert report.finding("mlp.das.fldd").estimate >= 1.0
    assert report.finding("mlp.das.fldd").verdict == "supported"
    assert report.finding("mlp.das.read_part").estimate <= 0.4
    assert abs(report.finding("mlp.component.fldd").estimate) <= 0.1
    assert report.finding("residual.das.read_part").estimate >= 0.85
    assert report.finding("residual.das.unread_part").estimate <= 0.2
    assert report.finding("facts.edit_difference").estimate <= 1e-6
    assert not report.failures(), report.failures()


@pytest.mark.slow
def test_the_verdicts_on_mechanism(report: "Report") -> None:
    for name in ("mlp.mechanism", "mlp.mechanism.containment", "mlp.mechanism.reader_split", "mlp.mechanism.dormancy"):
        assert report.finding(name).verdict == "refuted", report.finding(name)
    assert report.finding("residual.mechanism").verdict == "supported"


@pytest.mark.slow
def test_controls_fail(report: "Report") -> None:
    """Random directions do nothing, edits made for other facts write something else, and floors are floors."""
    for name in ("mlp.das.fldd", "residual.das.fldd"):
        null = report.finding(name).null
        assert null is not None
        assert -0.2 < null.low <= null.high < 0.3
    null = report.finding("facts.edit_difference").null
    assert null is not None
    assert null.low > 1e-3
    assert report.finding("task.floor").estimate <= 0.05


@pytest.mark.slow
def test_fldd_is_the_ratio_of_means(ioi: "HookedModel") -> None:
    """By hand, with hooks of Hugging Face's module, on the whole state of the stream."""
    import subspace_probe as sp
    from subspace_probe.studies.patching_illusion_tables import Bench

    test, site = sp.load_contrast("organism:ioi/ioi", split="test", n=24), sp.Site(2)
    bench = Bench(ioi, test, site, sp.LAST, 40, 0)
    margin, hits, _ = bench.outcomes([None, bench.pairs.difference])
    hf = ioi.backend.hf
    tokens = torch.stack([ioi.tokens([prompt]).ids[0] for prompt in test.prompts])
    answer, foil = (torch.tensor(ioi.token_ids([str(getattr(p, x)) for p in test.prompts])) for x in ("answer", "foil"))
    states: list[torch.Tensor] = []
    block = hf.model.layers[2]
    handle = block.register_forward_hook(lambda _m, _i, out: states.append(out[:, -1].clone()))
    with torch.no_grad():
        clean = hf(tokens).logits[:, -1]
    handle.remove()
    partner = states[0][torch.arange(24) ^ 1]
    handle = block.register_forward_hook(lambda _m, _i, out: torch.cat([out[:, :-1], partner[:, None]], dim=1))
    with torch.no_grad():
        patched = hf(tokens).logits[:, -1]
    handle.remove()
    rows = torch.arange(24)
    before, after = (x[rows, answer] - x[rows, foil] for x in (clean, patched))
    assert float(margin[0].mean()) == pytest.approx(float(before.mean()), abs=1e-4)
    fldd = 1 - float(margin[1].mean()) / float(margin[0].mean())
    assert fldd == pytest.approx(1 - float(after.mean()) / float(before.mean()), abs=1e-4)
    assert float(hits[1].double().mean()) == float((patched.argmax(-1) == foil).double().mean())
    assert fldd > 1.5  # and with the partner's own state nothing is left to chance: the answer is the other name


def test_published_table_gives_the_published_shares() -> None:
    """FLDD of the published logit differences, to the printed digits (patching_metrics_ioi, 2000 prompts)."""
    from subspace_probe.core.intervals import shares

    clean = 3.3635612
    for patched, printed in ((-0.7233011, 121.504), (-1.3092189, 138.924), (1.8206451, 45.872), (2.9183104, 13.238),
                             (3.6316764, -7.971), (3.3635612, 0.0)):  # fmt: skip
        margins = torch.tensor([[clean - 1, clean + 1], [patched - 0.5, patched + 0.5]], dtype=torch.float64)
        found = shares(margins[0] - margins[1], margins[0])
        assert 100 * float(found.mean()) == pytest.approx(printed, abs=2e-3)


@pytest.mark.slow
def test_settings_that_are_missing_are_named(chat: "HookedModel") -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("patching_illusion")
    with pytest.raises(ConfigError, match="contrast="):
        study.run(chat, study.Config())
    knob = sp.load_contrast("organism:chat/knob", split="train", n=64)
    with pytest.raises(ConfigError, match="mlp, residual"):
        study.run(chat, study.Config(), contrast=knob)


@pytest.mark.slow
def test_it_runs_on_pairs_of_ones_own(chat: "HookedModel") -> None:
    """Another model and other pairs: nothing is planted, nothing expected, and no facts are said to be tested."""
    import subspace_probe as sp
    from subspace_probe.studies import STUDIES

    study = STUDIES.load("patching_illusion")
    knob = sp.load_contrast("organism:chat/knob", split="train", n=96)
    settings = {"mlp": "L2.mlp_post", "residual": "L2.resid_post", "n_train": 48, "n_test": 16, "steps": 5,
                "restarts": 0, "least_share": 0.05}  # fmt: skip
    report = study.run(chat, study.Config(**settings), contrast=knob, progress=False)
    assert all(finding.expected is None for finding in report.findings)
    assert report.finding("facts.edit_difference").verdict == "not tested"
    assert report.finding("residual.das.fldd").verdict in ("supported", "refuted", "inconclusive")


@pytest.mark.slow
def test_the_report_survives_json_and_draws(report: "Report") -> None:
    import subspace_probe as sp

    again = sp.Report.from_json(report.to_json())
    assert again.findings == report.findings
    assert set(sp.figures.draw(again)) >= {"illusion", "dormancy", "nulls"}
