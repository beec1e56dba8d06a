"""The analytic test beds against their tables, worked out by hand, and against the laws that their noise follows."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from subspace_probe.organisms.analytic import DeadMLP, Pairs, ThreeNeurons

E1, E2, E3 = torch.eye(3, dtype=torch.float64)
ROOT2 = 2**0.5
BASE, SOURCE = torch.tensor([1.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)

# Patched subspace; h', y, distance of h' to natural states over |x' - x|; y without it; y of the source's run with the
# base's component in it. From x = 1 to x' = 5, so that an effect is (y - 1) / 4.
TABLE: dict[str, tuple[list[Tensor], list[float], float, float, float, float]] = {
    "e1": ([E1], [5, 0, 1], 1, 0.5**0.5, 1, 5),
    "e2": ([E2], [1, 0, 1], 1, 0, 1, 5),
    "e3, the truth": ([E3], [1, 0, 5], 5, 0.5**0.5, 0, 1),
    "v, the illusion": ([(E1 + E2) / ROOT2], [3, 2, 1], 5, (3 / 8) ** 0.5, 0, 1),
    "e1 and e2, which contain v": ([E1, E2], [5, 0, 1], 1, 0.5**0.5, 1, 5),
    "e2 and e3": ([E2, E3], [1, 0, 5], 5, 0.5**0.5, 0, 1),
    "the reader": ([(2 * E2 + E3) / 5**0.5], [1, 1.6, 1.8], 5, 0.18**0.5, 0, 1),
    "the natural line": ([(E1 + E3) / ROOT2], [5, 0, 5], 5, 0, 0, 1),
    "everything": ([E1, E2, E3], [5, 0, 5], 5, 0, 0, 1),
}


@pytest.fixture
def three() -> "ThreeNeurons":
    from subspace_probe.organisms.analytic import ThreeNeurons

    return ThreeNeurons()


def reproduces(net: "ThreeNeurons", row: str) -> bool:
    """Whether every cell of a row is met to 1e-9."""
    rows, h, y, distance, ablated, restored = TABLE[row]
    basis = torch.stack(rows)
    patched = net.patched_states(basis, BASE, SOURCE)
    exchanged = net.patch(basis, BASE, SOURCE)
    found = [*patched[0], exchanged.patched, exchanged.effect, net.distance(patched) / 4,
             net.ablate(basis, BASE), net.restore(basis, BASE, SOURCE)]  # fmt: skip
    return [float(x) for x in found] == pytest.approx([*h, y, (y - 1) / 4, distance, ablated, restored], abs=1e-9)


# ------------------------------------------------------------------------------------------------------ three neurons
@pytest.mark.parametrize("row", TABLE)
def test_the_table_of_the_three_neurons(three: "ThreeNeurons", row: str) -> None:
    assert reproduces(three, row)


def test_another_network_has_another_table(three: "ThreeNeurons") -> None:
    """Control: an actuator of half the gain halves the illusion and leaves the truth as it is."""
    weaker = replace(three, w_out=(0.0, 1.0, 1.0))
    assert not reproduces(weaker, "v, the illusion")
    assert weaker.patch(three.illusory, BASE, SOURCE).effect == pytest.approx(0.5)
    assert reproduces(weaker, "e3, the truth")


def test_what_the_table_teaches(three: "ThreeNeurons") -> None:
    from subspace_probe.linalg.angles import overlap

    v, truth, inside = three.illusory, three.faithful, three.component
    torch.testing.assert_close(torch.cat([v, truth]), torch.stack([(E1 + E2) / ROOT2, E3]))
    assert overlap(v, inside) == pytest.approx(1.0)

    def effect(basis: Tensor) -> float:
        return three.patch(basis, BASE, SOURCE).effect

    # a subspace may do everything inside one that does nothing
    assert effect(v) == pytest.approx(effect(truth), abs=1e-9)
    assert effect(inside) == pytest.approx(0.0, abs=1e-9)
    # necessity along v shares the illusion; that of what contains it does not
    assert [float(three.ablate(b, BASE)) for b in (v, truth, inside)] == pytest.approx([0, 0, 1], abs=1e-9)
    back = [float(three.restore(b, BASE, SOURCE)) for b in (v, truth, inside)]
    assert back == pytest.approx([1, 1, 5], abs=1e-9)
    # the truth leaves natural states further than the illusion does
    away = [float(three.distance(three.patched_states(b, BASE, SOURCE))) for b in (truth, v)]
    assert away[0] > away[1] + 0.3
    # but the second neuron is at a value that it never has
    held = {name: three.patched_states(b, BASE, SOURCE) * (1 - E2) for name, b in (("v", v), ("truth", truth))}
    assert {name: float(three.output(h)) for name, h in held.items()} == pytest.approx({"v": 1, "truth": 5}, abs=1e-9)


def test_steering_has_an_actuator_and_no_sensor(three: "ThreeNeurons") -> None:
    x, amount = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.7
    for direction, gain in ((E1, 0.0), (E2, 2.0), (E3, 1.0), (three.illusory[0], ROOT2)):
        torch.testing.assert_close(three.steer(direction, amount, x), x + amount * gain, rtol=0, atol=1e-12)


def test_rerouting_through_a_neuron_that_nothing_reads_is_confounded(three: "ThreeNeurons") -> None:
    from subspace_probe.core.errors import ConfigError

    rerouted = three.reroute(E1, 5.0)
    assert float(three.states(rerouted) @ E1) == 5.0
    assert float(three.output(three.states(rerouted))) == pytest.approx(5.0, abs=1e-12)  # all of the effect, and yet
    assert float(three.restore(E1[None], BASE, rerouted)) == pytest.approx(5.0, abs=1e-12)  # none goes through e1
    assert float(three.restore(E3[None], BASE, rerouted)) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ConfigError, match="Inputs do not move"):
        three.reroute(E2, 1.0)


def test_which_reader_the_split_is_taken_against(three: "ThreeNeurons") -> None:
    """The whole state's reader has one row, so that every direction it sees is one; that of e1 and e2 tells."""
    from subspace_probe.linalg.illusions import row_space, split_by_row_space

    reader = torch.tensor([three.w_out], dtype=torch.float64)
    change = three.states(SOURCE) - three.states(BASE)
    row = row_space(reader).basis
    for basis, r, share in ((three.faithful, [0, 0.4, 0.2], 0.2), (three.illusory, [0, 0.8 / ROOT2, 0.4 / ROOT2], 0.4)):
        split = split_by_row_space(basis, row)
        part = basis @ row.T @ row
        assert part[0].tolist() == pytest.approx(r, abs=1e-9)
        assert split.visible == pytest.approx(share, abs=1e-9)
        plain = three.output((change @ part.T) @ part) / 4  # the projection as it is, not of unit length
        assert float(plain) == pytest.approx(share, abs=1e-9)
        unit = three.patch(split.row, BASE, SOURCE)
        assert unit.effect == pytest.approx(1.0, abs=1e-9)  # truth and illusion alike
        crossed = three.output((change @ (basis - part).T) @ part) / 4  # what the invisible part reads
        assert float(crossed) == pytest.approx(1 - share, abs=1e-9)
    within = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)  # the reader of the component e1 and e2
    split = split_by_row_space(three.illusory, row_space(within).basis)
    assert split.visible == pytest.approx(0.5, abs=1e-9)
    torch.testing.assert_close(torch.cat([split.row, split.null]), torch.stack([E2, E1]))
    assert three.patch(split.row, BASE, SOURCE).effect == pytest.approx(0.0, abs=1e-9)
    assert three.patch(split.span, BASE, SOURCE).effect == pytest.approx(0.0, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------- dead MLP
@pytest.fixture(scope="module")
def dead() -> "tuple[DeadMLP, Pairs]":
    from subspace_probe.organisms.analytic import DeadMLP

    bed = DeadMLP(d=8, m=32, noise=0.1, hidden_noise=0.05)
    return bed, bed.pairs(1000, seed=0)


@pytest.mark.parametrize("carries", [0.0, 0.3, 1.0])
def test_what_a_bed_is_made_of(carries: float) -> None:
    from subspace_probe.organisms.analytic import DeadMLP

    bed = DeadMLP(carries=carries, seed=5)
    u, a, b, s = bed.readout, bed.isometry, bed.reader, bed.sensor
    torch.testing.assert_close(a.T @ a, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(b @ s, carries * u, rtol=0, atol=1e-12)
    outside = bed.gradient - (bed.gradient @ s) * s
    assert float(outside.norm()) == pytest.approx(2 * (1 - carries), abs=1e-12)
    pairs = bed.pairs(6, seed=0)
    assert pairs.value.tolist() == [1, -1, 1, -1, 1, -1]
    torch.testing.assert_close(pairs.residual @ u, pairs.value)
    torch.testing.assert_close(pairs.source_residual @ u, -pairs.value)


def test_a_patch_is_the_network_run_again(dead: "tuple[DeadMLP, Pairs]") -> None:
    """Pair by pair with explicit projectors, in numpy."""
    from subspace_probe.linalg.bases import random_subspace

    bed, pairs = replace(dead[0], carries=0.3), dead[1]
    basis = random_subspace(3, 32, seed=0, dtype=torch.float64)
    u, b, p = bed.readout.numpy(), bed.reader.numpy(), basis.T.numpy() @ basis.numpy()
    found = bed.patch(pairs, basis)
    assert all(x.shape == (1000,) for x in found)
    for i in range(0, 1000, 97):
        f, r, h, g = (x[i].numpy() for x in (pairs.value, pairs.residual, pairs.hidden, pairs.source_hidden))
        assert float(found.base[i]) == pytest.approx(f * (u @ (0.7 * r + b @ h)), abs=1e-12)
        assert float(found.patched[i]) == pytest.approx(f * (u @ (0.7 * r + b @ (h + p @ (g - h)))), abs=1e-12)
    assert found.effect == pytest.approx(bed.expected_effect(basis), abs=0.02)
    assert found.effect == pytest.approx(
        float((found.base.mean() - found.patched.mean()) / (found.base.mean() - found.source.mean()))
    )


def test_the_figures_of_the_dead_mlp(dead: "tuple[DeadMLP, Pairs]") -> None:
    from subspace_probe.linalg.illusions import linearised_optimum, row_space, split_by_row_space

    bed, pairs = dead
    v = bed.v[None]
    split = split_by_row_space(v, row_space(bed.reader).basis)
    assert split.visible == pytest.approx(0.5, abs=1e-12)
    whole = bed.patch_whole(pairs).effect
    row, null, span = (bed.patch(pairs, part).effect for part in (split.row, split.null, split.span))
    assert bed.expected_effect(v) == pytest.approx(1.0, abs=1e-12)
    assert bed.patch(pairs, v).effect == pytest.approx(1.0, abs=0.02)
    assert abs(whole) < 0.02
    assert abs(row) < 0.02
    assert null == pytest.approx(0.0, abs=1e-12)  # identities, whatever the noise
    assert span == pytest.approx(row, abs=1e-12)
    assert bed.patch_residual(pairs, bed.readout[None]).effect == pytest.approx(1.0, abs=0.02)
    values, basis = linearised_optimum(*bed.moves(pairs), 1)
    assert float((basis @ bed.v).abs()) > 0.9999
    assert float(values[0]) == pytest.approx(1.0, abs=0.02)
    clean = bed.metric(pairs, pairs.residual, pairs.hidden).mean()
    assert 1 - float(bed.ablate(pairs, v).mean() / clean) == pytest.approx(1.0, abs=0.02)  # "necessary"
    assert 1 - float(bed.ablate_whole(pairs).mean() / clean) == pytest.approx(0.0, abs=0.02)


def test_the_dormancy_of_the_dead_mlp(dead: "tuple[DeadMLP, Pairs]") -> None:
    """Against the law of the noise: 0.05 in every direction of h, and 0.1 of what of r comes through, but for u."""
    from subspace_probe.linalg.illusions import row_space, split_by_row_space

    bed, pairs = dead
    actuator = bed.gradient / 2
    through = bed.isometry.T @ actuator
    sd = float((0.1**2 * (through @ through - (through @ bed.readout) ** 2) + 0.05**2).sqrt())
    found = bed.dormancy(pairs, bed.v)
    torch.testing.assert_close(bed.actuator(bed.v[None]), actuator[None])
    assert found.sd == pytest.approx(sd, rel=0.05)
    assert found.d_prime < 4 * 2 / 1000**0.5
    assert found.z == pytest.approx(1 / sd, rel=0.1)  # the patched coordinate is -f
    assert found.z > 10
    null = split_by_row_space(bed.v[None], row_space(bed.reader).basis).null
    sensed = (pairs.hidden @ null.T)[:, 0]
    classes = [sensed[pairs.value > 0], sensed[pairs.value < 0]]
    d_prime = float((classes[0].mean() - classes[1].mean()) / ((classes[0].var() + classes[1].var()) / 2).sqrt())
    assert d_prime == pytest.approx(2 / 0.05, rel=0.07)
    # held at its natural range, 3.09 standard deviations at either side, the actuator gives that much
    clamped = bed.clamp(pairs, actuator[None], bed.patched_hidden(pairs, bed.v[None]))
    assert bed.exchanged(pairs, pairs.residual, clamped).effect == pytest.approx(3.09 * sd, abs=0.04)
    only = bed.clamp(pairs, actuator[None], pairs.hidden)
    assert abs(bed.exchanged(pairs, pairs.residual, only).effect) < 1e-3


def test_random_directions_in_the_dead_mlp(dead: "tuple[DeadMLP, Pairs]") -> None:
    """Mean 0 and standard deviation |D||G| / sqrt(m (m + 2)) over the difference of 2."""
    from subspace_probe.linalg.bases import random_directions

    bed, pairs = dead
    drawn = random_directions(500, 32, seed=0, dtype=torch.float64)
    effects = np.array([bed.patch(pairs, v[None]).effect for v in drawn])
    sd = 2 * 2 / (32 * 34) ** 0.5 / 2
    assert effects.std() == pytest.approx(sd, rel=0.25)  # products of two Gaussians: 6 % is one standard error
    assert effects.mean() == pytest.approx(0.0, abs=4 * sd / 500**0.5)
    assert effects.max() < 0.5
    assert effects.max() > 0.15  # control: they are not all nothing


@pytest.mark.parametrize("carries", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_between_the_twins(carries: float) -> None:
    """The whole does c, and v more than that by its capacity, until at c = 1 nothing is left."""
    from subspace_probe.linalg.illusions import capacity
    from subspace_probe.organisms.analytic import DeadMLP

    bed = DeadMLP(carries=carries, noise=0.0, hidden_noise=0.0)
    pairs = bed.pairs(4, seed=0)
    length = (carries**2 + 4 * (1 - carries) ** 2) ** 0.5
    assert bed.patch_whole(pairs).effect == pytest.approx(carries, abs=1e-12)
    assert bed.patch(pairs, bed.v[None]).effect == pytest.approx((carries + length) / 2, abs=1e-12)
    assert capacity(*bed.moves(pairs)).tolist() == pytest.approx([(length - carries) / 2] * 4, abs=1e-12)
    assert bed.patch_residual(pairs, bed.readout[None]).effect == pytest.approx(1.0, abs=1e-12)
    kept = bed.patch(pairs, bed.actuator(bed.v[None])).effect
    assert kept == pytest.approx(bed.expected_effect(bed.actuator(bed.v[None])), abs=1e-12)
    if carries == 0.0:
        assert kept == pytest.approx(0.0, abs=1e-12)
        found = bed.dormancy(pairs, bed.v)
        assert (found.d_prime, found.z) == (0.0, float("inf"))  # never moves by itself
    if carries == 1.0:
        assert kept == pytest.approx(1.0, abs=1e-12)
        found = bed.dormancy(pairs, bed.v)
        assert (found.d_prime, found.z) == (float("inf"), 0.0)


def test_drawn_beds_are_what_they_are_called() -> None:
    """With noise, over seeds, by exchange of the whole; each twin fails what the other passes."""
    from subspace_probe.organisms.analytic import DeadMLP

    sizes = set()
    for seed in range(20):
        beds = DeadMLP.illusory(seed), DeadMLP.faithful(seed)
        assert replace(beds[0], carries=1.0) == beds[1]
        assert beds[0].hidden_noise >= 0.02
        sizes.add((beds[0].d, beds[0].m))
        for bed, whole, z in zip(beds, (0.0, 1.0), ((5, 60), (0, 0.5)), strict=True):
            pairs = bed.pairs(400, seed=seed)
            assert bed.patch(pairs, bed.v[None]).effect == pytest.approx(1.0, abs=0.06)
            assert bed.patch_whole(pairs).effect == pytest.approx(whole, abs=0.06)
            assert bed.patch(pairs, bed.actuator(bed.v[None])).effect == pytest.approx(whole, abs=0.06)
            assert z[0] <= bed.dormancy(pairs, bed.v).z <= z[1]
    assert len(sizes) > 10


def test_beds_that_cannot_be() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.organisms.analytic import DeadMLP

    for wrong in ({"d": 1}, {"d": 8, "m": 8}, {"noise": -0.1}, {"carries": 1.5}):
        with pytest.raises(ConfigError, match="2 <= d < m"):
            DeadMLP(**wrong)
    bed = DeadMLP()
    with pytest.raises(ConfigError, match="sees nothing of this direction"):
        bed.dormancy(bed.pairs(4, seed=0), bed.sensor)
    assert torch.equal(bed.pairs(4, seed=0).hidden, bed.pairs(4, seed=0).hidden)
    assert not torch.equal(bed.pairs(4, seed=0).hidden, bed.pairs(4, seed=1).hidden)
