"""The line on mechanism: its numbers against plain hooks, its rule on known illusions, its silence on random ones."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.findings import Finding, Verdict
    from subspace_probe.core.reports import Report
    from subspace_probe.organisms.illusions import LabelledSubspace

DECIDING = ("exchange", "containment", "reader_split", "dormancy", "clamp", "readable", "elsewhere")


def audited(case: "LabelledSubspace", pairs: int = 16) -> "Report":
    import subspace_probe as sp

    natural = case.pairs.first_pairs(pairs)
    positive, negative = natural.sides()
    source = sp.Source.of(case.model.capture(positive, sites=case.site, where=case.where))
    patch = sp.Patch(source, case.where, case.subspace)
    return sp.audit(case.model, patch, negative, case.metric, natural=natural, checks=DECIDING, pairs=pairs)


@pytest.fixture(scope="module")
def illusory() -> "list[tuple[LabelledSubspace, Report]]":
    from subspace_probe.organisms.illusions import illusory_cases

    return [(case, audited(case)) for case in illusory_cases(limit=2)]


@pytest.fixture(scope="module")
def faithful() -> "list[tuple[LabelledSubspace, Report]]":
    from subspace_probe.organisms.illusions import faithful_cases

    return [(case, audited(case)) for case in faithful_cases(limit=2)]


@pytest.mark.slow
def test_planted_and_trained_illusions_are_refuted_and_faithful_directions_supported(illusory, faithful) -> None:
    for case, report in illusory:
        assert report.finding("mechanism").verdict == "refuted", case.name
        assert report.finding("mechanism.exchange").verdict == "supported", "control: it does flip answers"
    for case, report in faithful:
        assert report.finding("mechanism").verdict == "supported", (case.name, report.finding("mechanism"))


@pytest.mark.slow
def test_flips_of_subspace_and_component_are_those_of_plain_hooks(illusory, faithful) -> None:
    """`exchanging.Exchange` patches through Hugging Face's own modules, and asks for the whole vocabulary's best."""
    from subspace_probe.organisms.exchanging import Exchange

    for case, report in (*illusory, *faithful):
        held = Exchange(case.model, case.pairs.first_pairs(16), case.where)
        inside, whole = held.flips(case.site, case.subspace.basis), held.flips(case.site)
        excess = report.finding("mechanism.containment").estimate
        assert excess == pytest.approx(inside - whole, abs=0.13), case.name  # the best of two against the best of all


def _natural(chat, n: int = 96, pairs: int = 8):
    import subspace_probe as sp
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.metrics import metric_for

    requests = sp.load_contrast("organism:chat/requests", split="test", n=n).where(framing=0)
    metric = metric_for("refusal_score", chat)
    return Natural(chat, requests, sp.Site(2), sp.T_POST_INST, metric, pairs=pairs), metric


def test_shares_and_flips_are_ratios_by_hand_in_both_directions(chat) -> None:
    pairs, _ = _natural(chat)
    half = len(pairs) // 2
    assert pairs.labels.tolist() == [0] * half + [1] * half
    assert torch.equal(pairs.wanted[:half], pairs.clean[half:])
    assert torch.equal(pairs.source[:half], pairs.base[half:])
    gap = float((pairs.clean[half:] - pairs.clean[:half]).mean())
    assert pairs.gap == pytest.approx(gap)
    values = pairs.clean.clone()
    values[:half] += 0.3 * gap  # a third towards, of the negative sides only
    assert float(pairs.shares(values).mean()) == pytest.approx(0.15, abs=1e-9)
    assert not pairs.flips(pairs.clean).any()
    assert pairs.flips(pairs.wanted).all()
    assert float(pairs.shares(pairs.wanted).mean()) == pytest.approx(1.0)


def test_putting_back_the_base_is_a_no_op_and_the_whole_difference_is_the_whole_patch(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.conditions import outcomes

    pairs, metric = _natural(chat)
    everything = sp.Subspace.span(torch.eye(chat.spec.d_model))
    conditions = [
        pairs.moved(torch.zeros_like(pairs.base)), pairs.moved(pairs.difference), pairs.moved(pairs.within(everything)),
        *(patch for _, patch in pairs.containers),
    ]  # fmt: skip
    values = outcomes(chat, pairs.prompts.prompts, conditions, [metric])[0]
    assert torch.allclose(values[0], pairs.clean, atol=1e-4)
    assert torch.allclose(values[1], values[2], atol=1e-3)
    assert torch.allclose(values[1], values[3], atol=1e-4)
    assert not torch.allclose(values[0], values[1], atol=0.1)  # control: the patch does something
    assert torch.allclose(values[-1], pairs.wanted, atol=1e-3)  # all tokens of a layer: the partner's own run


def test_conditions_that_begin_at_different_layers_are_those_run_alone(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.interventions.conditions import outcomes

    pairs, metric = _natural(chat)
    patches = [patch for *_, patch in pairs.residual(4)]
    together = outcomes(chat, pairs.prompts.prompts, [None, *patches, None], [metric])[0]
    for patch, values in zip(patches, together[1:-1], strict=True):
        alone = chat.logits(pairs.prompts, interventions=[patch])
        assert torch.allclose(metric(alone, pairs.prompts.prompts).double(), values, atol=1e-3)
    assert torch.equal(together[0], together[-1])
    assert isinstance(patches[0], sp.Patch)


def test_pairs_that_do_not_match_and_single_pairs_are_refused(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import ConfigError, DataError
    from subspace_probe.diagnostics.natural import Natural, partner_rows

    pairs, metric = _natural(chat)
    with pytest.raises(DataError, match="different numbers of tokens"):
        partner_rows(torch.tensor([0, 0, 1]), 2, sp.ALL)
    with pytest.raises(ConfigError, match="at least two"):
        Natural(chat, pairs.prompts, sp.Site(2), sp.T_POST_INST, metric, pairs=1)
    with pytest.raises(DataError, match="one complete pair only"):
        Natural(chat, pairs.prompts.take([0, len(pairs) // 2]), sp.Site(2), sp.T_POST_INST, metric)


def test_pairs_that_do_not_differ_in_the_metric_are_refused_and_copies_count_once(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.core.errors import DataError
    from subspace_probe.diagnostics.natural import Natural

    pairs, metric = _natural(chat, n=192, pairs=12)
    swapped = list(range(24))
    for row in range(0, 12, 2):  # half of the pairs with their sides exchanged
        swapped[row], swapped[row + 12] = swapped[row + 12], swapped[row]
    mixed = pairs.prompts.take(swapped)
    mixed = replace(mixed, labels=pairs.prompts.labels, pairs=pairs.prompts.pairs, groups=tuple(range(24)))
    with pytest.raises(DataError, match="does not tell the two sides"):
        Natural(chat, mixed, sp.Site(2), sp.T_POST_INST, metric)
    twice = pairs.prompts.take([0, 1, 12, 13] * 3)
    copies = replace(twice, pairs=(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5), groups=(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5))
    assert len(Natural(chat, copies, sp.Site(2), sp.T_POST_INST, metric)) == 4


# ------------------------------------------------------------------------------------- the rule, on findings by hand
def _finding(name: str, verdict: "Verdict", note: str = "") -> "Finding":
    from subspace_probe.core.findings import Finding

    return Finding(f"mechanism.{name}", name, 1.0, verdict=verdict, note=note or name)


RULES = [
    # use, containment, reader_split, dormancy, clamp, readable, elsewhere -> mechanism
    (("supported", "supported", "supported", "supported", "supported", "", ""), "supported"),
    (("supported", "supported", "supported", "refuted", "supported", "", ""), "supported"),  # dormancy convicts nobody
    (("supported", "supported", "refuted", "refuted", "supported", "", ""), "refuted"),
    (("supported", "supported", "refuted", "supported", "refuted", "", ""), "refuted"),
    (("supported", "refuted", "supported", "supported", "supported", "", ""), "refuted"),  # containment does, alone
    (("inconclusive", "refuted", "", "", "", "", ""), "refuted"),
    (("supported", "inconclusive", "supported", "supported", "supported", "", ""), "inconclusive"),  # inflated
    (("supported", "", "supported", "supported", "supported", "", ""), "not tested"),
    (("inconclusive", "supported", "", "", "", "supported", "supported"), "inconclusive"),
    (("refuted", "not tested", "", "", "", "supported", "supported"), "refuted"),  # readable, not used
    (("refuted", "not tested", "", "", "", "refuted", "supported"), "inconclusive"),
    (("refuted", "not tested", "", "", "", "supported", "refuted"), "inconclusive"),  # no positive control
    (("refuted", "not tested", "", "", "", "", ""), "inconclusive"),
    (("refuted", "not tested", "", "", "", "inconclusive", "supported"), "inconclusive"),
    (("not tested", "", "", "", "", "", ""), "not tested"),
]


@pytest.mark.parametrize(("given", "wanted"), RULES)
def test_the_rule(given, wanted) -> None:
    from subspace_probe.diagnostics.verdicts import verdict_lines

    found = [_finding(name, verdict) for name, verdict in zip(DECIDING, given, strict=True) if verdict]
    (line,) = verdict_lines(found)
    assert line.name == "mechanism"
    assert line.verdict == wanted
    assert line.note


def test_control_rests_on_a_null_and_on_what_it_does_elsewhere() -> None:
    from subspace_probe.diagnostics.verdicts import verdict_lines

    def control(**verdicts: "Verdict") -> "Finding":
        named = {"kl": "specificity.kl"}
        found = [replace(_finding(n, v), name=f"control.{named.get(n, n)}") for n, v in verdicts.items()]
        return verdict_lines(found)[0]

    assert control(random="supported").verdict == "supported"
    assert "specificity" in control(random="supported").note  # what was not tested is said
    assert control(random="supported", kl="refuted").verdict == "refuted"
    assert control(random="supported", integrity="refuted").verdict == "refuted"
    assert control(random="refuted").verdict == "refuted"
    assert control(random="supported", stability="refuted").verdict == "inconclusive"
    assert control(random="supported", dose="refuted").verdict == "inconclusive"
    assert control(random="inconclusive", kl="supported").verdict == "inconclusive"
    assert control(first_order="supported").verdict == "supported"
    assert control(random="not tested", first_order="supported").verdict == "supported"
    assert control(random="not tested").verdict == "not tested"


# ---------------------------------------------------------------------------------------- the checks' own arithmetic
def test_z_is_the_distance_in_target_standard_deviations_and_infinite_where_nothing_varies() -> None:
    from subspace_probe.diagnostics.dormancy import Coordinates

    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    natural = torch.randn(2000, 2, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 3.0])
    natural[:, 0] += 4 * labels
    right = natural + torch.where(labels == 1, -4.0, 4.0)[:, None] * torch.tensor([1.0, 0.0])
    assert Coordinates(natural, right, labels).z() < 0.15
    off = right + torch.tensor([0.0, 30.0])  # ten standard deviations in one of two coordinates
    assert Coordinates(natural, off, labels).z() == pytest.approx(10 / 2**0.5, rel=0.1)
    assert Coordinates(natural[:, :1], right[:, :1] + 5, labels).z() == pytest.approx(5, rel=0.05)
    constant = torch.zeros(2000, 1, dtype=torch.float64)
    assert Coordinates(constant, constant + 1.0, labels).z() == float("inf")
    assert Coordinates(constant, constant, labels).z() == 0.0


def test_the_analytic_bed_is_refuted_by_the_checks_own_bounds_and_its_faithful_twin_is_not() -> None:
    """The same statistics and margins on the dead MLP, where effects are known in closed form."""
    from subspace_probe.diagnostics.containment import Containment
    from subspace_probe.organisms.analytic import DeadMLP

    def excess(bed: DeadMLP, basis: torch.Tensor) -> float:
        pairs = bed.pairs(200, seed=3)
        flips = [
            ((made.patched - (made.source + made.base) / 2) * (made.source - made.base).sign() > 0).double().mean()
            for made in (bed.patch(pairs, basis), bed.patch_whole(pairs))
        ]
        return float(flips[0] - flips[1])

    check = Containment()
    for seed in range(30):
        illusion, twin = DeadMLP.illusory(seed), DeadMLP.faithful(seed)
        assert excess(illusion, illusion.v[None]) >= check.excess
        assert excess(twin, twin.v[None]) < check.inflated


def test_readable_is_held_out_and_blind_to_labels_that_mean_nothing(chat) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.readable import Readable

    pairs, metric = _natural(chat, n=192, pairs=24)
    whole = sp.Subspace.span(torch.eye(chat.spec.d_model)[:100], site=pairs.site, where=pairs.where)
    steer = sp.Steer(whole, where=pairs.where)
    case = Case(chat, steer, pairs.prompts, metric, "refusal_score", 0.1, natural=pairs)
    assert Readable().read(case, torch.empty(0, len(pairs)))[0].estimate > 0.95
    _, noise = _natural(chat, n=192, pairs=24), torch.Generator().manual_seed(1)
    # control: states without a signal, in more dimensions than there are prompts, would be read perfectly in sample
    pairs.base = torch.randn(pairs.base.shape, generator=noise)
    assert 0.2 < Readable().read(case, torch.empty(0, len(pairs)))[0].estimate < 0.8


def test_weights_read_what_they_read(chat) -> None:
    """An exact reader: what it does not see changes nothing, and its row part does all that the span does."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.interventions.conditions import outcomes
    from subspace_probe.metrics import metric_for

    requests = sp.load_contrast("organism:chat/requests", split="test", n=64).where(framing=0)
    metric = metric_for("refusal_score", chat)
    pairs = Natural(chat, requests, sp.Site(1, "mlp_post"), sp.T_POST_INST, metric, pairs=6)
    reader = pairs.read_space
    down = chat.backend.hf.model.layers[1].mlp.down_proj.weight.detach().double()
    assert reader.exact
    assert reader.rank == int(torch.linalg.matrix_rank(down))
    draw = torch.Generator().manual_seed(0)
    vector = sp.Subspace.span(torch.randn(down.shape[1], generator=draw), site=pairs.site)
    split = reader.split(vector)
    assert torch.allclose(down @ split.null.T, torch.zeros_like(down @ split.null.T), atol=1e-6)
    big = 20 * torch.ones(len(pairs.base), 1)
    conditions = [pairs.moved(big * split.null.float()), pairs.moved(big * split.row.float())]
    values = outcomes(chat, pairs.prompts.prompts, conditions, [metric])[0]
    assert torch.allclose(values[0], pairs.clean, atol=1e-3)
    assert not torch.allclose(values[1], pairs.clean, atol=1e-2)  # control


@pytest.fixture(scope="module")
def asked() -> "tuple[Contrast, Contrast]":
    import subspace_probe as sp
    from subspace_probe.core.prompts import asking

    both = [sp.load_contrast("organism:chat/requests", split=split, n=144) for split in ("train", "test")]
    train, test = (part.where(framing=0).map(lambda p: asking(p, "{x} . is this harmful ?")) for part in both)
    return train, test


@pytest.mark.slow
def test_in_the_natural_organism_harmfulness_is_readable_and_refuted_by_the_second_pattern(asked) -> None:
    import subspace_probe as sp
    from subspace_probe.organisms import load_truth

    train, test = asked
    model, truth = sp.load_model("organism:chat-natural"), load_truth("chat-natural").readable_not_used
    assert truth is not None
    acts = model.capture(train, sites=truth.site, where=truth.where)
    steer = sp.Steer(sp.MeanDifference(null_draws=0).fit(acts, truth.site), where=truth.where)
    report = sp.audit(
        model, steer, test.where(label=0), "judgement_score", natural=test, checks=["integrity", *DECIDING], pairs=16
    )
    line = report.finding("mechanism")
    assert line.verdict == "refuted"
    assert "readable, not used" in line.note
    assert report.finding("mechanism.elsewhere").verdict == "supported"


@pytest.mark.slow
def test_at_a_site_that_is_used_what_is_used_is_supported_and_a_mere_reader_refuted() -> None:
    """The planted vector, LDA (AUROC 1), and a discriminant of all but the planted vector, at one site of `chat`."""
    from subspace_probe.diagnostics.random_controls import random_like
    from subspace_probe.organisms.unused import unused_cases

    verdicts: dict[str, str] = {}
    for case in unused_cases():
        if case.kind in ("planted", "lda", "lda without planted") and "chat/" in case.name:
            verdicts[case.kind] = audited(case).finding("mechanism").verdict
            if case.kind == "planted":
                fakes = [replace(case, subspace=random_like(case.subspace, seed=seed)) for seed in range(4)]
                assert not any(audited(fake, 8).finding("mechanism").verdict == "supported" for fake in fakes)
        if len(verdicts) == 3:
            break
    assert verdicts == {"planted": "supported", "lda": "refuted", "lda without planted": "refuted"}


@pytest.mark.slow
def test_a_subspace_that_takes_a_skill_with_it_is_refuted_on_control_and_the_one_that_spares_it_is_not() -> None:
    """Both take refusals away, and both are what the model uses: only what else they do tells them apart."""
    from itertools import islice

    import subspace_probe as sp
    from subspace_probe.organisms.entangled import entangled_cases

    verdicts: dict[str, str] = {}
    for case in islice(entangled_cases(), 2):
        harmful, _ = case.pairs.first_pairs(16).sides()
        checks = ["integrity", "random_controls", "specificity"]
        skill, edit = case.skill.first_pairs(16), sp.Ablate(case.subspace)
        report = sp.audit(case.model, edit, harmful, case.metric, neutral=skill, checks=checks)
        verdicts[case.label] = report.finding("control").verdict
    assert verdicts == {"entangled": "refuted", "faithful": "supported"}


def test_states_that_do_not_vary_are_not_readable(chat) -> None:
    """Ranks by order of rows would read them perfectly, since negative rows come first."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.readable import Readable

    pairs, metric = _natural(chat)
    one = sp.Subspace.span(torch.eye(chat.spec.d_model)[:1], site=pairs.site, where=pairs.where)
    case = Case(chat, sp.Steer(one, where=pairs.where), pairs.prompts, metric, "refusal_score", 0.1, natural=pairs)
    pairs.base = torch.zeros_like(pairs.base)
    assert Readable().read(case, torch.empty(0, len(pairs)))[0].estimate == 0.5
