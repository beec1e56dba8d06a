"""The rest of the illusion checks: each against plain hooks, closed forms or libraries, and where it must fail."""

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.diagnostics.auditing import Examination

pytestmark = pytest.mark.slow

NATURAL = ("exchange_integrity", "capacity", "sensor", "ledger", "off_distribution", "metric_sensitivity",
           "downstream_clamp", "necessity", "exchange_dose", "writers_readers")  # fmt: skip
CONTRAST = ("first_order", "generalisation", "matched", "mediation")
LAYER = 2


@pytest.fixture(scope="module")
def steer(chat):
    """Refusal in `chat` at its planted place; with what it was found on."""
    import subspace_probe as sp

    train = sp.load_contrast("organism:chat/requests", split="train", n=96)
    finder = sp.MeanDifference(null_draws=0)
    acts = chat.capture(train, sites=sp.Site(LAYER), where=sp.T_POST_INST).relabel("refused")
    return sp.Steer(finder.fit(acts, sp.Site(LAYER)), where=sp.T_POST_INST), (finder, acts)


@pytest.fixture(scope="module")
def requests():
    import subspace_probe as sp

    return sp.load_contrast("organism:chat/requests", split="test", n=96).where(framing=0)


@pytest.fixture(scope="module")
def audited(chat, steer, requests) -> "Examination":
    from subspace_probe.diagnostics.auditing import examine

    edit, refit = steer
    return examine(chat, edit, requests.where(label=0), "refusal_score", refit=refit, natural=requests,
                   rerouted=requests, checks=[*CONTRAST, *NATURAL], pairs=12)  # fmt: skip


@pytest.fixture(scope="module")
def at_random(chat, steer, requests) -> "Examination":
    """The same audit of a random direction: the control of every check."""
    from subspace_probe.diagnostics.auditing import examine
    from subspace_probe.diagnostics.random_controls import random_like

    edit, refit = steer
    fake = edit.with_subspace(random_like(edit.subspace, seed=17))
    checks = ["mediation", "capacity", "necessity", "exchange_dose", "metric_sensitivity"]
    return examine(chat, fake, requests.where(label=0), "refusal_score", refit=refit, natural=requests,
                   rerouted=requests, checks=checks, pairs=12)  # fmt: skip


def values_with(chat, prompts, moves, metric, layer: int = LAYER) -> torch.Tensor:
    """The metric of each prompt alone, a move added to its last token behind one block by a plain hook."""
    found = []
    for prompt, move in zip(prompts, moves, strict=True):

        def add(module, args, output, move=move):
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden.clone()
            moved[0, -1] += move.to(hidden)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = chat.backend.hf.model.layers[layer].register_forward_hook(add)
        with torch.no_grad():
            logits = chat.backend.hf(chat.tokens([prompt]).ids).logits[:, -1].float()
        handle.remove()
        found.append(metric(logits, [prompt])[0].double())
    return torch.stack(found)


def gradients_at(chat, prompts, moves, metric) -> torch.Tensor:
    """Gradient of each prompt's metric by what is added to its last token, where so much is added already."""
    found = []
    for prompt, move in zip(prompts, moves, strict=True):
        extra = move.clone().requires_grad_()

        def add(module, args, output, extra=extra):
            hidden = output[0] if isinstance(output, tuple) else output
            moved = torch.cat([hidden[:, :-1], hidden[:, -1:] + extra], dim=1)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = chat.backend.hf.model.layers[LAYER].register_forward_hook(add)
        with torch.enable_grad():
            value = metric(chat.backend.hf(chat.tokens([prompt]).ids).logits[:, -1].float(), [prompt])[0]
        handle.remove()
        found.append(torch.autograd.grad(value, extra)[0])
    return torch.stack(found).double()


def share(pairs, values) -> float:
    """Ratio of mean changes towards the partner, by hand."""
    half = len(values) // 2
    clean = pairs.clean
    towards = torch.cat([values[:half] - clean[:half], clean[half:] - values[half:]]).mean()
    return float(towards / (clean[half:] - clean[:half]).mean())


# ---------------------------------------------------------------------------------------------------------- integrity
def test_exchanging_nothing_changes_nothing_and_everything_is_the_whole_patch(audited) -> None:
    from subspace_probe.interventions.conditions import outcomes

    pairs = audited.case.pairs
    moves = [torch.zeros_like(pairs.base), pairs.along(torch.eye(pairs.base.shape[1])), pairs.difference]
    nothing, every, whole = outcomes(pairs.model, pairs.prompts.prompts, [pairs.moved(m) for m in moves],
                                     [pairs.metric])[0]  # fmt: skip
    assert torch.allclose(nothing, pairs.clean, atol=1e-4)
    assert torch.allclose(every, whole, atol=1e-4)
    assert not torch.allclose(whole, pairs.clean, atol=1e-1)


def test_states_put_back_elsewhere_are_noticed(audited) -> None:
    from subspace_probe.diagnostics.exchange_integrity import ExchangeIntegrity
    from subspace_probe.interventions.conditions import outcomes

    case = audited.case
    assert audited.report.finding("mechanism.exchange_integrity").verdict == "supported"
    wrong = case.pairs.put(case.pairs.base.roll(1, 0))  # the rows of other prompts
    values = outcomes(case.model, case.pairs.prompts.prompts, [wrong, None], [case.metric])[0]
    assert ExchangeIntegrity().read(case, values)[0].verdict == "refuted"


def test_all_of_them_are_answered_in_notes(audited) -> None:
    for check in (*CONTRAST[1:], *NATURAL):
        found = [f for f in audited.report.findings if f.name.endswith(f".{check}")]
        assert [bool(f.note) for f in found] == [True], check
        assert found[0].verdict in ("supported", "inconclusive", "refuted"), found[0]


# ----------------------------------------------------------------------------------------------------------- capacity
def test_capacity_is_the_closed_form_and_the_strongest_patch_is_run(chat, audited) -> None:
    case = audited.case
    pairs = case.pairs
    d = pairs.difference
    steps = [gradients_at(chat, pairs.prompts.prompts, t * d, case.metric) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    sign = torch.where(torch.tensor(pairs.prompts.labels) == 1, -1.0, 1.0)[:, None]
    g = torch.stack(steps).mean(0) * sign / pairs.gap
    wide = d.double()
    by_hand = (wide.norm(dim=1) * g.norm(dim=1) - (wide * g).sum(1)) / 2
    found = audited.report.finding("mechanism.capacity")
    assert found.estimate == pytest.approx(float(by_hand.mean()), rel=1e-3)
    assert found.verdict == "supported"
    # the strongest direction over all pairs, by the whole d x d matrix; its cosine is in the note
    middle = wide.T @ g / len(wide)
    best = torch.linalg.eigh((middle + middle.T) / 2)[1][:, -1]
    cosine = abs(float(best @ case.subspace.basis[0].double()))
    assert f"|cos| between them {cosine:.2f}" in found.note
    inside = wide @ case.subspace.basis.double().T @ case.subspace.basis.double()
    plain = values_with(chat, pairs.prompts.prompts, inside.float(), case.metric)
    assert torch.allclose(audited.values["capacity"][0], plain, atol=1e-3)


def test_a_site_that_could_host_an_illusion_says_so(audited) -> None:
    from subspace_probe.diagnostics.capacity import Capacity

    found = Capacity(full=0.05).read(audited.case, audited.values["capacity"])[0]
    assert found.verdict == "inconclusive"


# ------------------------------------------------------------------------------------------------------ random nulls
def test_matched_directions_vary_as_the_states_do() -> None:
    """Mean squared cosine with the leading axis: as drawn from the covariance itself, unlike uniform ones."""
    import subspace_probe as sp
    from subspace_probe.diagnostics.matched import matched_like
    from subspace_probe.diagnostics.random_controls import random_like
    from subspace_probe.linalg.bases import covariance_matched_directions

    spread = torch.linspace(3.0, 0.1, 12)
    states = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) * spread + 5.0
    subspace = sp.Subspace.span(torch.ones(1, 12))
    drawn = torch.cat([matched_like(subspace, states, seed=i).basis for i in range(400)])
    uniform = torch.cat([random_like(subspace, seed=i).basis for i in range(400)])
    reference = covariance_matched_directions(400, torch.cov(states.T), seed=1)
    axis = torch.linalg.eigh(torch.cov(states.T))[1][:, -1]
    means = [float((rows @ axis).square().mean()) for rows in (drawn, reference, uniform)]
    assert means[0] == pytest.approx(means[1], abs=0.05)
    assert abs(means[2] - means[1]) > 0.1
    assert torch.equal(matched_like(subspace, states, seed=3).scale, subspace.scale)
    assert matched_like(sp.Subspace.span(torch.eye(12)[:3]), states, seed=3).rank == 3


def test_matched_is_refuted_only_without_an_effect(audited) -> None:
    from dataclasses import replace

    from subspace_probe.diagnostics.matched import Matched

    case, n = audited.case, len(audited.case.clean)
    spread = torch.linspace(-0.01, 0.01, n, dtype=torch.float64)
    draws = torch.linspace(-5.0, 5.0, 40, dtype=torch.float64)[:, None] + case.clean
    verdicts = [
        Matched().read(replace(case, edited=case.clean + size + spread, margin=0.5), draws)[0].verdict
        for size in (0.0, 2.0, 9.0)
    ]
    assert verdicts == ["refuted", "inconclusive", "supported"]


@pytest.mark.parametrize("kind", ["steer", "raw", "patch", "outside", "ablate"])
def test_first_order_is_the_gradient_times_the_change(chat, audited, kind: str) -> None:
    """By hand, one prompt and one direction at a time, with gradients by a plain hook."""
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.diagnostics.first_order import prediction
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source

    case, site = audited.case, sp.Site(LAYER)
    prompts, subspace = case.contrast.prompts, case.subspace
    x = chat.capture(case.contrast, sites=site, where=sp.LAST).at(site)
    mean = Source.value(site, x.mean(0) + 1.0)
    edit, change = {
        "steer": (sp.Steer(subspace, 0.5, where=sp.LAST), None),
        "raw": (sp.Steer(subspace, 2.0, where=sp.LAST, unit="raw"), None),
        "patch": (Patch(mean, sp.LAST, subspace), x.mean(0) + 1.0 - x),
        "outside": (Patch(mean, sp.LAST, subspace, outside=True), x.mean(0) + 1.0 - x),
        "ablate": (sp.Ablate(subspace, [site], sp.LAST), -x),
    }[kind]
    g = gradients_at(chat, prompts, torch.zeros_like(x), case.metric).float()
    v = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(2)), dim=0)
    if change is None:
        move = v.expand_as(x) * (0.5 * subspace.scale[0] if kind == "steer" else 2.0)
    else:
        inside = (change @ v)[:, None] * v
        move = change - inside if kind == "outside" else inside
    by_hand = float((g * move).sum(1).mean())
    found = prediction(replace(case, intervention=edit))(v[None, None].double())
    assert float(found[0]) == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    assert abs(by_hand) > 1e-3


def test_predicted_effects_have_the_moments_of_random_directions(audited) -> None:
    """Closed form of an exchange along a uniformly random direction, for one prompt."""
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.diagnostics.first_order import _frames, prediction
    from subspace_probe.interventions.gradients import metric_gradients
    from subspace_probe.linalg.illusions import random_direction_moments

    site, one = sp.Site(LAYER), audited.case.contrast.take([0])
    case = replace(audited.case, contrast=one, intervention=sp.Ablate(audited.case.subspace, [site], sp.LAST))
    d = -case.model.capture(one, sites=site, where=sp.LAST).at(site)
    g = metric_gradients(case.model, one.prompts, site, sp.LAST, case.metric)
    mean, second = random_direction_moments(d, g)
    drawn = torch.cat([prediction(case)(_frames(1000, 1, 128, seed)) for seed in range(4)])
    assert float(drawn.square().mean()) == pytest.approx(float(second[0]), rel=0.1)
    assert float(drawn.mean()) == pytest.approx(float(mean[0]), abs=5 * float(second[0] / 4000) ** 0.5)
    two = _frames(50, 2, 8, 0)
    assert torch.allclose(two @ two.mT, torch.eye(2, dtype=torch.float64).expand(50, 2, 2), atol=1e-10)


def test_first_order_is_used_only_where_it_holds(chat, steer, requests) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.first_order import FirstOrder
    from subspace_probe.diagnostics.random_controls import RandomControls, random_like

    def judged(edit, **settings):
        report = sp.audit(chat, edit, requests.where(label=0), "refusal_score", checks=[FirstOrder(**settings)])
        return report.finding("control.first_order")

    edit = steer[0].with_strength(0.1)
    short = judged(edit)
    assert short.verdict == "supported"
    assert short.null is not None
    assert short.null.level == 0.95
    assert judged(edit, tolerance=0.0).verdict == "not tested"
    fake = edit.with_subspace(random_like(edit.subspace, seed=17))
    assert judged(fake).verdict != "supported"
    for strength in (4.0, 32.0):  # random pushes of that length are nowhere near linear
        long = judged(edit.with_strength(strength))
        assert long.verdict == "not tested"
        assert "first order does not hold" in long.note
    assert "several sites" in judged(sp.Ablate(edit.subspace, where=sp.LAST)).note
    # what it spares: random directions that are run, at the same strength
    run = sp.audit(chat, edit, requests.where(label=0), "refusal_score", checks=[RandomControls(draws=60)])
    null = run.finding("control.random").null
    assert null is not None
    assert short.null.high == pytest.approx(null.high, rel=0.4)
    assert short.null.low == pytest.approx(null.low, rel=0.4)


# ---------------------------------------------------------------------------------------------------- generalisation
def test_generalisation_compares_like_prompts(chat, audited, steer, requests) -> None:
    from dataclasses import replace

    from subspace_probe.diagnostics.generalisation import Generalisation, alike

    case, (edit, (_, acts)) = audited.case, steer
    like = alike(acts.contrast, case.contrast)
    assert set(like.factors["label"]) == {0}
    assert set(like.factors["framing"]) == {0}
    assert len(like) == sum(a == b == 0 for a, b in zip(*(acts.contrast.factors[n] for n in ("label", "framing")),
                                                        strict=True))  # fmt: skip
    assert not len(alike(case.contrast, case.contrast))  # nothing is held out
    step = (edit.subspace.scale[:, None] * edit.subspace.basis).sum(0)
    nothing = torch.zeros(len(like), 128)
    there = (values_with(chat, like.prompts, nothing + step, case.metric)
             - values_with(chat, like.prompts, nothing, case.metric)).mean()  # fmt: skip
    found = audited.report.finding("control.generalisation")
    assert found.verdict == "supported"
    assert found.estimate == pytest.approx(float(there - (case.edited - case.clean).mean()), abs=1e-2)
    lost = replace(case, edited=case.clean + 0.01)  # an effect on its own prompts alone
    assert Generalisation().read(lost, torch.empty(0, len(case.clean)))[0].verdict == "refuted"


def test_generalisation_goes_by_both_intervals() -> None:
    from subspace_probe.core.findings import Interval
    from subspace_probe.diagnostics.generalisation import Generalisation

    def judged(here: tuple[float, float], there: tuple[float, float]) -> str:
        return Generalisation()._judged(Interval(*here), Interval(*there), 0.1)

    assert judged((0.9, 1.1), (0.9, 1.1)) == judged((-1.1, -0.9), (-1.1, -0.9)) == "supported"
    assert judged((-0.1, 0.1), (0.9, 1.1)) == judged((0.9, 1.1), (-1.1, -0.9)) == "refuted"
    assert judged((0.3, 0.5), (0.9, 1.1)) == "inconclusive"  # some of it is lost
    assert judged((0.9, 1.1), (-0.1, 0.3)) == "inconclusive"  # there was nothing to lose


# --------------------------------------------------------------------------------------- sensor, actuator, necessity
def test_the_ledger_of_three_neurons() -> None:
    """The published toy: h = (x, 0, x), read by (0, 2, 1) as a whole, by (0, 2) as the component of the first two."""
    from subspace_probe.diagnostics.ledger import cross_share
    from subspace_probe.linalg.illusions import row_space

    d = torch.tensor([[4.0, 0.0, 4.0]]).double()
    truth, illusion = torch.eye(3)[2:].double(), torch.tensor([[1.0, 1.0, 0.0]]).double() / 2**0.5
    whole = row_space(torch.tensor([[0.0, 2.0, 1.0]]))
    assert cross_share(truth, whole, d) == pytest.approx(0.8)
    assert cross_share(illusion, whole, d) == pytest.approx(0.6)
    assert cross_share(illusion[:, :2], row_space(torch.tensor([[0.0, 2.0]])), d[:, :2]) == pytest.approx(1.0)
    assert cross_share(truth, row_space(torch.eye(3)), d) == pytest.approx(0.0)


def test_the_four_entries_of_the_ledger_add_up_to_the_exchange(audited) -> None:
    from subspace_probe.diagnostics.ledger import Ledger

    case = audited.case
    pairs = case.pairs
    moved = [next(iter(patch.source.states.values())) - pairs.base for patch in Ledger().conditions(case)]
    assert torch.allclose(sum(moved), pairs.within(case.subspace), atol=1e-4)
    assert moved[1].norm() > 1e-2  # and the cross term is not nothing
    assert audited.report.finding("mechanism.ledger").estimate < 0.3


def test_the_sensor_of_what_nothing_reads(chat, audited, requests) -> None:
    """In the MLP's neurons: the mean difference's part that the down projection maps to zero, and the rest."""
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.diagnostics.sensor import Sensor

    case = audited.case
    pairs = Natural(chat, requests, sp.Site(LAYER, "mlp_post"), sp.LAST, case.metric, pairs=12)
    labels = torch.tensor(pairs.prompts.labels)
    away = (pairs.base[labels == 1].mean(0) - pairs.base[labels == 0].mean(0)).double()
    weight = chat.backend.hf.model.layers[LAYER].mlp.down_proj.weight.detach().double()
    seen = torch.linalg.pinv(weight) @ (weight @ away)
    # half in the kernel, half outside of it, where nothing varies between the classes
    other = torch.randn(len(away), generator=torch.Generator().manual_seed(0)).double()
    quiet = torch.linalg.pinv(weight) @ (weight @ other)
    quiet = quiet - (quiet @ away) / (seen @ away) * seen
    unseen = away - seen
    mixed = unseen / unseen.norm() + quiet / quiet.norm()
    verdicts = {}
    for name, vector in {"seen": seen, "mixed": mixed}.items():
        edit = sp.Steer(sp.Subspace.span(vector, site=pairs.site), where=sp.LAST)
        found = Sensor().read(replace(case, intervention=edit, natural=pairs), torch.empty(0, len(pairs)))[0]
        at = pairs.base.double() @ (seen if name == "seen" else quiet)
        a, b = at[labels == 1], at[labels == 0]
        by_hand = float((a.mean() - b.mean()).abs() / ((a.var() + b.var()) / 2).sqrt())
        assert found.estimate == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
        verdicts[name] = found.verdict
    assert verdicts == {"seen": "supported", "mixed": "inconclusive"}


def test_necessity_is_what_is_lost_of_the_gap(chat, audited, at_random) -> None:
    case = audited.case
    pairs, basis = case.pairs, case.subspace.basis
    half = len(pairs) // 2
    away = pairs.base.mean(0) - pairs.base
    rows = audited.values["necessity"]
    for row, move in (
        (0, away @ basis.T @ basis),
        (-2, away),
        (-1, pairs.difference - pairs.difference @ basis.T @ basis),
    ):
        plain = values_with(chat, pairs.prompts.prompts, move, case.metric)
        assert torch.allclose(rows[row], plain, atol=1e-3)
    lost = [1 - float((v[half:] - v[:half]).mean()) / pairs.gap for v in (rows[0], rows[-2])]
    found = audited.report.finding("mechanism.necessity")
    assert found.estimate == pytest.approx(lost[0] - lost[1], abs=1e-6)
    assert f"the subspace {lost[0]:.0%}" in found.note
    assert found.verdict == "supported"
    control = at_random.report.finding("mechanism.necessity")
    assert control.verdict == "inconclusive"
    assert control.estimate < -0.4


# ------------------------------------------------------------------------------------- distances and inner products
def test_distances_are_those_of_scikit_learn() -> None:
    from sklearn.covariance import OAS
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    from subspace_probe.diagnostics.off_distribution import distances

    generator = torch.Generator().manual_seed(0)
    natural = torch.randn(80, 6, generator=generator).double() * torch.linspace(3, 0.2, 6).double() + 1
    states = torch.randn(20, 6, generator=generator).double() * 2
    found = distances(states, natural, 5, 0.9)
    fitted = OAS().fit(natural.numpy())
    mahalanobis = torch.tensor(fitted.mahalanobis(states.numpy())).sqrt() * (79 / 80) ** 0.5  # n - 1, not n
    assert torch.allclose(found[:, 0], mahalanobis, rtol=1e-6)
    pca = PCA(0.9, svd_solver="full").fit(natural.numpy())
    back = torch.tensor(pca.inverse_transform(pca.transform(states.numpy())))
    assert torch.allclose(found[:, 1], (states - back).norm(dim=1), rtol=1e-6)
    near, _ = NearestNeighbors(n_neighbors=5).fit(natural.numpy()).kneighbors(states.numpy())
    assert torch.allclose(found[:, 2], torch.tensor(near).mean(1), rtol=1e-6)
    few = distances(states, natural[:4], 2, 0.9)  # fewer states than dimensions
    assert bool(few.isfinite().all())
    assert float(few[:, 0].min()) > 0


def test_states_far_from_the_data_are_told_apart(audited, monkeypatch) -> None:
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.diagnostics.off_distribution import OffDistribution

    def far_along_one_axis(pairs, subspace):
        moved = torch.zeros_like(pairs.base)
        moved[:, 5] = 30.0
        return moved

    near = audited.report.finding("mechanism.off_distribution")
    assert near.verdict == "supported"
    assert near.estimate < 0.75
    monkeypatch.setattr(Natural, "within", far_along_one_axis)
    far = OffDistribution().read(audited.case, torch.empty(0, len(audited.case.pairs)))[0]
    assert far.verdict == "inconclusive"
    assert far.estimate > 0.99


def test_the_whitened_reader_is_the_oblique_projector(audited) -> None:
    """P = V (V^T S V)^-1 V^T S written out in full, S the inverse of scikit-learn's shrunk covariance."""
    from sklearn.covariance import OAS

    from subspace_probe.diagnostics.metric_sensitivity import whitened_reader
    from subspace_probe.linalg.bases import random_subspace

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    base = torch.randn(60, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    basis = random_subspace(2, 7, seed=1).double()
    parts = [base[labels == label].double() for label in (0, 1)]
    centred = torch.cat([part - part.mean(0) for part in parts])
    inverse = torch.linalg.inv(torch.tensor(OAS(assume_centered=True).fit(centred.numpy()).covariance_))
    v = basis.T
    by_hand = v @ torch.linalg.inv(v.T @ inverse @ v) @ v.T @ inverse
    reader = whitened_reader(base, labels, basis)
    assert torch.allclose(v @ reader, by_hand, atol=1e-8)
    assert not torch.allclose(v @ reader, v @ v.T, atol=1e-2)
    assert audited.report.finding("mechanism.metric_sensitivity").verdict == "supported"


# ----------------------------------------------------------------------------------------------- clamp, dose, sites
def test_clamped_neurons_stay_in_range_and_the_clamp_alone_does_nothing(chat, audited) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.downstream_clamp import DownstreamClamp, later_neurons

    case = audited.case
    pairs, last = case.pairs, sp.Site(3, "mlp_post")
    assert later_neurons(pairs) == [last]
    free, clamped, _alone = DownstreamClamp().conditions(case)
    low, high = clamped.ranges[last]
    natural = chat.capture(pairs.prompts, sites=last, where=sp.LAST).at(last)
    assert torch.allclose(low, natural.quantile(0.001, dim=0))
    assert torch.allclose(high, natural.quantile(0.999, dim=0))
    outside = [
        float((states - states.clamp(low, high)).abs().max())
        for edit in (free, clamped)
        for states in [chat.capture(pairs.prompts, sites=last, where=sp.LAST, interventions=[edit]).at(last)]
    ]
    assert outside[0] > 0.05
    assert outside[1] < 1e-6
    values = audited.values["downstream_clamp"]
    assert not bool(pairs.flips(values[2]).any())
    assert torch.allclose(values[0], audited.values["capacity"][0])
    none = values.clone()
    none[1] = pairs.clean  # an effect that the clamp takes away
    assert DownstreamClamp().read(case, none)[0].verdict == "inconclusive"
    assert audited.report.finding("mechanism.downstream_clamp").verdict == "supported"


def test_the_exchange_by_parts(chat, audited, at_random) -> None:
    from subspace_probe.diagnostics.exchange_dose import ExchangeDose

    case = audited.case
    half = 0.5 * case.pairs.within(case.subspace)
    plain = values_with(chat, case.pairs.prompts.prompts, half, case.metric)
    found = audited.report.finding("mechanism.exchange_dose")
    assert found.estimate == pytest.approx(share(case.pairs, plain), abs=1e-3)
    assert found.verdict == "supported"
    late = audited.values["exchange_dose"].clone()
    late[:-1] = case.pairs.clean  # nothing happens up to the whole exchange
    assert ExchangeDose().read(case, late)[0].verdict == "inconclusive"


def test_interaction_is_what_single_sites_do_not_add_up_to(chat, steer, requests) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.interaction import Interaction
    from subspace_probe.metrics import metric_for

    harmful = requests.where(label=1)
    sites = [sp.Site(2, "attn_out"), sp.Site(2, "mlp_out"), sp.Site(3, "resid_pre")]
    edit = sp.Ablate(steer[0].subspace, sites, sp.LAST)
    report = sp.audit(chat, edit, harmful, "refusal_score", checks=["interaction"])
    metric = metric_for("refusal_score", chat)

    def effect(*at: sp.Site) -> torch.Tensor:
        edited = chat.logits(harmful, interventions=[sp.Ablate(edit.subspace, list(at), sp.LAST)])
        return (metric(edited, harmful.prompts) - metric(chat.logits(harmful), harmful.prompts)).double()

    by_hand = effect(*sites) - sum(effect(site) for site in sites)
    found = report.finding("control.interaction")
    assert found.estimate == pytest.approx(float(by_hand.mean()), abs=1e-3)
    assert found.verdict == "inconclusive"  # they repeat each other
    clean = torch.zeros(len(harmful), dtype=torch.float64)
    case = Case(chat, edit, harmful, metric, "refusal_score", 0.1, clean=clean, edited=clean - 3)
    additive = Interaction().read(case, torch.stack([clean - 1] * 3))[0]
    assert additive.estimate == pytest.approx(0.0)
    assert additive.verdict == "supported"
    by_layer = Interaction(most=2).conditions(case)
    sites = [only.edits(chat.spec.n_layers) for only in by_layer]
    assert [sorted(site.layer for site in own) for own in sites] == [[2, 2], [3]]


def test_writers_add_up_and_the_direct_path_is_the_unembedding_of_the_move(chat, audited) -> None:
    import subspace_probe as sp
    from subspace_probe.diagnostics.writers_readers import WritersReaders, writers

    case = audited.case
    pairs = case.pairs
    moved = pairs.within(case.subspace)
    shares = writers(pairs, moved)
    first = chat.capture(pairs.prompts, sites=sp.Site(0, "resid_pre"), where=sp.LAST).at(sp.Site(0, "resid_pre"))
    by_hand = float((moved * first.roll(len(pairs) // 2, 0).sub(first)).sum() / moved.square().sum())
    assert shares["the embeddings"] == pytest.approx(by_hand, abs=1e-4)
    mlp = chat.capture(pairs.prompts, sites=sp.Site(2, "mlp_out"), where=sp.LAST).at(sp.Site(2, "mlp_out"))
    wrote = float((moved * mlp.roll(len(pairs) // 2, 0).sub(mlp)).sum() / moved.square().sum())
    assert shares["L2.mlp_out"] == pytest.approx(wrote, abs=1e-4)
    assert wrote > 0.2
    read = WritersReaders()._read_by(case)
    direct = values_with(chat, pairs.prompts.prompts, moved, case.metric, layer=3)
    assert read["L3.resid_post"] == pytest.approx(share(pairs, direct), abs=1e-3)
    assert set(read) == {"L3.attn_out", "L3.mlp_out", "L3.resid_post"}
    assert read["L3.mlp_out"] > 0.5 > read["L3.attn_out"]


# ---------------------------------------------------------------------------------------------------------- mediation
def test_mediation_is_what_is_lost_when_the_coordinate_is_put_back(chat, audited, at_random, requests) -> None:
    from subspace_probe.diagnostics.natural import Natural

    case = audited.case
    pairs = Natural(chat, requests, case.pairs.site, case.pairs.where, case.metric, pairs=len(requests))
    half = len(pairs) // 2
    back = pairs.within(case.subspace)[half:]
    left = values_with(chat, pairs.prompts.prompts[half:], back, case.metric)
    by_hand = float((pairs.clean[half:] - left).mean() / (pairs.clean[half:] - pairs.clean[:half]).mean())
    found = audited.report.finding("mechanism.mediation")
    assert found.estimate == pytest.approx(by_hand, abs=1e-3)
    assert found.verdict == "supported"
    assert at_random.report.finding("mechanism.mediation").verdict == "refuted"


def test_without_rewritten_prompts_or_pairs_nothing_is_tested(chat, steer, requests) -> None:
    import subspace_probe as sp

    report = sp.audit(chat, steer[0], requests.where(label=0), "refusal_score",
                      checks=["mediation", "capacity", "matched", "generalisation", "trained_nulls"])  # fmt: skip
    notes = {finding.name: finding for finding in report.findings}
    for name, reason in {"mechanism.mediation": "rerouted=", "mechanism.capacity": "natural=",
                         "control.matched": "refit=", "control.generalisation": "refit=",
                         "mechanism.trained_nulls": "not trained"}.items():  # fmt: skip
        assert notes[name].verdict == "not tested"
        assert reason in notes[name].note


# ------------------------------------------------------------------------------------------------------ trained nulls
@pytest.mark.slow
def test_training_on_nothing_does_not_reach_the_true_subspace_but_reaches_itself(chat) -> None:
    from dataclasses import replace

    import subspace_probe as sp
    from subspace_probe.diagnostics.cases import Case
    from subspace_probe.diagnostics.natural import Natural
    from subspace_probe.diagnostics.trained_nulls import TrainedNulls
    from subspace_probe.interventions.conditions import outcomes
    from subspace_probe.metrics import metric_for

    train = sp.load_contrast("organism:chat/harmfulness", split="train", n=64)
    test = sp.load_contrast("organism:chat/harmfulness", split="test", n=32)
    site, metric = sp.Site(LAYER), metric_for("refusal_score", chat)
    subspace = sp.DAS(steps=30, restarts=0, controls=()).fit(chat, train, site, sp.LAST)
    pairs = Natural(chat, test, site, sp.LAST, metric, pairs=12)
    acts = chat.capture(train, sites=site, where=sp.LAST)
    case = Case(chat, sp.Steer(subspace, where=sp.LAST), test, metric, "refusal_score", 0.1, acts=acts, natural=pairs)
    check = TrainedNulls(draws=2)
    assert not check.missing(case)

    def verdict(case: Case) -> str:
        return check.read(case, outcomes(chat, pairs.prompts.prompts, check.conditions(case), [metric])[0])[0].verdict

    assert verdict(case) == "supported"
    shuffled, apart = check._trained(case)
    away = apart @ subspace.basis.T
    assert float(away.abs().max()) < 1e-4
    assert torch.allclose(apart @ apart.mT, torch.ones(2, 1, 1), atol=1e-4)
    null = replace(subspace, basis=shuffled[0])  # itself one of the null: training explains its effect
    assert verdict(replace(case, intervention=sp.Steer(null, where=sp.LAST))) == "refuted"
