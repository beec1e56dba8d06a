"""The gate, the statistics of clean states, and the ladder's verdicts on organisms whose truth is known."""

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.models.tiny import tiny, words

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.reports import Report

pytestmark = pytest.mark.slow


def activations(states: torch.Tensor, labels: list[int], pairs: tuple[int, ...] = ()) -> "Activations":
    import subspace_probe as sp
    from subspace_probe.core.activations import MemoryRows

    prompts = tuple(sp.Prompt(text=f"p{i}") for i in range(len(labels)))
    contrast = sp.Contrast("made", prompts, tuple(labels), pairs)
    rows = torch.arange(len(labels))
    return sp.Activations(MemoryRows({sp.Site(1): states}), contrast, rows, torch.zeros_like(rows), sp.LAST)


def two_classes(n: int, gap: float, *, d: int = 6, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Standard normal states, the positive class moved along the first axis."""
    labels = [i % 2 for i in range(n)]
    states = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    states[:, 0] += gap * torch.tensor(labels)
    return states, labels


# ---------------------------------------------------------------------------------------------------------- the gate
def test_only_what_is_read_well_may_be_a_target() -> None:
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.diagnostics.eligibility import eligibility

    strong = eligibility(activations(*two_classes(48, 8.0)), sp.Site(1), draws=19)
    assert strong.eligible
    assert strong.accuracy == 1.0
    assert strong.p == pytest.approx(0.05)
    strong.require()
    weak = eligibility(activations(*two_classes(48, 1.2)), sp.Site(1), draws=19)
    assert 0.55 < weak.accuracy < 0.9  # Bayes: Phi(0.6) = 0.73
    assert not weak.eligible
    with pytest.raises(ConfigError, match=r"L1.resid_post cannot be a target: cross-validated accuracy 0\.\d+ \(needs"):
        weak.require()
    assert replace(weak, least=0.5).eligible == (weak.p <= 0.05)
    assert not replace(strong, p=0.06).eligible
    with pytest.raises(ConfigError, match="at least one permutation"):
        eligibility(activations(*two_classes(8, 1.0)), sp.Site(1), draws=0)


def test_copies_in_one_pair_do_not_vouch_for_each_other() -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.eligibility import eligibility

    # labels mean nothing, and every prompt is there four times: what was seen is known again
    states = torch.randn(12, 24, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 0)
    labels = [i % 2 for i in range(12) for _ in range(4)]
    together = tuple(i for i in range(12) for _ in range(4))
    assert eligibility(activations(states, labels, tuple(range(48))), sp.Site(1), draws=19).accuracy > 0.95
    assert not eligibility(activations(states, labels, together), sp.Site(1), draws=19).eligible


def test_a_target_is_the_other_classes_mean_score() -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.eligibility import targets_of

    acts = activations(*two_classes(60, 4.0))
    finder = sp.MeanDifference(null_draws=0)
    for label in (0, 1):
        (target,) = targets_of(acts, finder, [sp.Site(1)], label=label)
        own, other = (acts.at(sp.Site(1))[acts.labels == each] for each in (label, 1 - label))
        assert target.margin == pytest.approx(float(target.score(other).mean()), rel=1e-5)
        assert target.margin == pytest.approx(float((own.mean(0) - other.mean(0)).norm()) / 2, rel=1e-4)
        assert float(target.score(own).mean()) == pytest.approx(-target.margin, rel=1e-4)


# ------------------------------------------------------------------------------------------------- how clean states lie
def test_percentiles_scores_and_cosines_of_clean_states() -> None:
    import numpy as np
    from scipy.spatial.distance import mahalanobis
    from sklearn.covariance import oas

    import subspace_probe as sp
    from subspace_probe.diagnostics.rungs import Clean

    site = sp.Site(1)
    states, labels = two_classes(200, 6.0)
    held, _ = two_classes(100, 6.0, seed=1)
    clean = Clean.of(activations(states, labels), site, 1, held)
    mark = torch.tensor(labels, dtype=torch.bool)
    source, goal = states[mark].double().mean(0), states[~mark].double().mean(0)
    centred = (states.double() - torch.where(mark[:, None], source, goal)).numpy()
    inverse = np.linalg.inv(oas(centred, assume_centered=True)[0])
    naive = [min(mahalanobis(x, mean, inverse) ** 2 for mean in (source, goal)) for x in held.double()]
    np.testing.assert_allclose(clean.distance(held).numpy(), naive, rtol=1e-6)
    share = clean.percentile(held)
    np.testing.assert_allclose(share.numpy(), [np.mean(np.array(naive) <= own + 1e-9) for own in naive])
    assert float(clean.percentile(held + 30)[0]) == 1.0
    assert float(clean.percentile(goal[None].float())[0]) == 0.0
    torch.testing.assert_close(clean.score(site, torch.stack([source, goal])), torch.tensor([-1.0, 1.0]).double())
    way = (goal - source)[None]
    across = torch.zeros_like(way)
    across[0, 0], across[0, 1] = -way[0, 1], way[0, 0]
    found = [float(clean.cosine(site, moved)) for moved in (way, -2 * way, across, torch.zeros_like(way))]
    assert found == pytest.approx([1.0, -1.0, 0.0, 0.0], abs=1e-9)


# ------------------------------------------------------------------------------------------------------ on a tiny model
def words_contrast(n: int = 24) -> "Contrast":
    """Prompts of random words that differ in one: w7 (1) or w8 (0), near the end."""
    import subspace_probe as sp

    rows = torch.randint(30, 33, (n, 6), generator=torch.Generator().manual_seed(4)).tolist()
    texts = [" ".join(f"w{i}" for i in (*row, mark, 20, 21)) for row in rows for mark in (8, 7)]
    prompts = tuple(sp.Prompt(text=text, answer="w40", foil="w50") for text in texts)
    return sp.Contrast("words", prompts, tuple(i % 2 for i in range(2 * n)), tuple(i // 2 for i in range(2 * n)))


@cache
def climbed() -> "Report":
    import subspace_probe as sp
    from subspace_probe.diagnostics.climber import Effort
    from subspace_probe.diagnostics.eligibility import targets_of
    from subspace_probe.diagnostics.ladder import ladder
    from subspace_probe.interventions.embedding_search import EmbeddingSearch
    from subspace_probe.interventions.token_search import TokenSearch
    from subspace_probe.models import load_model

    model = load_model(tiny("llama"), tokenizer=words())
    train, test = words_contrast().split(0.7, seed=0)
    acts = model.capture(train, sites=[sp.Site(1)], where="last-2")
    targets = targets_of(acts, sp.MeanDifference(null_draws=0), [sp.Site(1)])
    effort = Effort(EmbeddingSearch(steps=3), TokenSearch(budget=30, width=10, top_k=8), draws=2, permutations=19)
    free = [sp.at(2), sp.at(3)]
    return ladder(model, test, targets, free, "logit_difference", train=train, effort=effort)


def test_every_level_stands_beside_its_controls() -> None:
    from subspace_probe.figures.ladder import LADDER

    report = climbed()
    table = report.tables["ladder"]
    assert len(table.rows) == 3 * 2 * 3
    met = table.where(level="activation", measure="target met")
    assert met.where(condition="rerouted").column("rate") == [1.0]  # in closed form
    assert met.where(condition="wrong direction").column("rate") == [0.0]
    assert met.where(condition="random").column("rate")[0] < 0.5
    assert {finding.name.split(".")[2] for finding in report.findings} == {"activation", "embedding", "token"}
    assert all(finding.interval and finding.null for finding in report.findings)
    figure: Any = LADDER(report)
    assert len(figure.data) == 6


def test_tables_say_what_was_spent_and_what_is_left() -> None:
    report = climbed()
    searches = {row["search"]: row for row in report.tables["searches"].records()}
    assert set(searches) == {"target", "random", "answer"}
    assert all(row["rows"] <= row["budget"] == 30 for row in searches.values())
    # two blocks against all three, and no unembedding
    assert searches["random"]["layer_forwards"] == 2 * searches["random"]["rows"]
    assert searches["answer"]["layer_forwards"] >= 3 * searches["answer"]["rows"]
    prompts = report.tables["prompts"].where(level="token").records()
    assert all(set(map(int, row["ids"].split())) <= set(range(3, 128)) for row in prompts)
    assert all(0 <= row["percentile"] <= 1 for row in prompts)
    at = report.tables["persistence"].where(level="activation").records()
    assert [row["at"] for row in at] == ["L1.resid_post", "L2.resid_post"]
    assert at[0]["score"] == pytest.approx(1.0, abs=1e-3)
    assert at[0]["cosine"] == pytest.approx(1.0, abs=1e-3)
    assert {row["level"] for row in report.tables["elsewhere"].records()} == {"activation", "embedding", "token"}
    assert report.from_json(report.to_json()).tables.keys() == report.tables.keys()


def test_bad_questions_are_refused() -> None:
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError
    from subspace_probe.diagnostics.ladder import ladder
    from subspace_probe.interventions.targets import HalfSpace
    from subspace_probe.models import load_model

    model = load_model(tiny("llama"), tokenizer=words())
    contrast = words_contrast(4)
    target = HalfSpace(torch.ones(32), site=sp.Site(1), where=sp.LAST)
    ask: Any = ladder
    for targets in ([], [target, target]):
        with pytest.raises(ConfigError, match="Give at least one"):
            ask(model, contrast, targets, [sp.at(2)], "logit_difference", train=contrast)
    with pytest.raises(ConfigError, match="at which site"):
        ask(model, contrast, [replace(target, site=None)], [sp.at(2)], "logit_difference", train=contrast)
    with pytest.raises(DataError, match="1 prompts of label 1 to reroute"):
        ask(model, contrast.take([0, 1]), [target], [sp.at(2)], "logit_difference", train=contrast)


# --------------------------------------------------------------------------------------------------------- on organisms
@pytest.mark.slow
@pytest.mark.parametrize(("name", "verdict"), [("override", "reachable"), ("robust", "steerable, not reachable")])
def test_verdicts_are_those_of_the_exhaustive_truth(name: str, verdict: str) -> None:
    """Twenty prompts, a quarter of the exhaustive budget; every suffix was run for the truth beside the weights."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.climber import Effort
    from subspace_probe.diagnostics.eligibility import targets_of
    from subspace_probe.diagnostics.ladder import ladder
    from subspace_probe.interventions.token_search import TokenSearch
    from subspace_probe.organisms import load_truth
    from subspace_probe.organisms.guarding import FREE, SLOTS

    truth = load_truth(name).suffixes
    assert truth is not None
    assert truth.flipped == (1.0 if name == "override" else 0.0)
    model = sp.load_model(f"organism:{name}")
    train = sp.load_contrast(f"organism:{name}/requests", split="train", n=96)
    test = sp.load_contrast(f"organism:{name}/requests", split="test", n=40)
    sites = [sp.Site(0), sp.Site(1)]
    acts = model.capture(train, sites=sites, where=sp.LAST)
    targets = targets_of(acts, sp.MeanDifference(null_draws=0), sites)
    effort = Effort(tokens=TokenSearch(budget=400), draws=3, permutations=19, baselines=False)
    given: dict[str, Any] = {"train": train, "allowed": FREE, "effort": effort}
    free = [sp.at(slot) for slot in SLOTS]
    report = ladder(model, test, targets, free, "logit_difference", ineligible="flag", **given)
    verdicts = {row["site"]: row["verdict"] for row in report.tables["verdicts"].records()}
    assert verdicts == {"L0.resid_post": "not eligible", "L1.resid_post": verdict}
    assert report.finding("L1.resid_post.activation.flipped").estimate >= 0.95
    assert report.finding("L1.resid_post.token.flipped").estimate == (1.0 if name == "override" else 0.0)
