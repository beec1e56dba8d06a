"""Projections of updates against their closed form, and random ones against the energy that chance keeps."""

import pytest
import torch
from torch import Tensor


def _update(out: int = 12, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_two_parts_add_up_and_so_do_their_energies(side: str) -> None:
    from subspace_probe.interventions.update_projection import frames, project_update
    from subspace_probe.linalg.modes import modes

    spectrum = modes(_update(seed=1))
    assert spectrum is not None
    onto, update = frames("top", spectrum, 3), _update()
    inside, outside = (project_update(update, onto, side=side, part=part) for part in ("parallel", "orthogonal"))  # type: ignore[arg-type]
    assert torch.allclose(inside + outside, update)
    share = (inside.square().sum() + outside.square().sum()) / update.square().sum()
    assert float(share) == pytest.approx(1.0, abs=1e-5)
    u, _, vt = torch.linalg.svd(_update(seed=1), full_matrices=False)
    left, right = u[:, :3] @ u[:, :3].T, vt[:3].T @ vt[:3]
    by_hand = {"left": left @ update, "right": update @ right, "both": left @ update @ right}[side]
    assert torch.allclose(inside, by_hand)
    assert not torch.allclose(inside, project_update(update, frames("random", spectrum, 3), side=side, part="parallel"))  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_matched_ranks_keep_the_energy_asked_for(side: str, shape: tuple[int, int]) -> None:
    from subspace_probe.interventions.update_projection import frames, matched_rank, project_update
    from subspace_probe.linalg.modes import modes

    update, spectrum = _update(*shape), modes(_update(*shape, seed=2))
    assert spectrum is not None
    rank = matched_rank(0.25, shape, side)  # type: ignore[arg-type]
    kept = [
        project_update(update, frames("random", spectrum, rank, seed=s), side=side, part="parallel").square().sum()  # type: ignore[arg-type]
        for s in range(60)
    ]
    assert float(torch.stack(kept).mean() / update.square().sum()) == pytest.approx(0.25, abs=0.04)


def test_weights_that_alignment_left_alone_keep_their_whole_update() -> None:
    from subspace_probe.interventions.update_projection import as_matrix, frames, write_projected
    from subspace_probe.linalg.modes import modes

    aligned = {"a": torch.zeros(4, 3), "b": torch.zeros(5, 2), "norm": torch.zeros(6)}
    update = {name: torch.randn(value.shape) for name, value in aligned.items()}
    vector = torch.zeros(6)
    vector[0] = 2.0
    onto = {name: frames("top", m, m.rank) for name, x in (("a", torch.eye(4, 3)), ("norm", vector))
            if (m := modes(as_matrix(x)))}  # fmt: skip
    written: dict[str, Tensor] = {}
    kept = write_projected(written.__setitem__, aligned, update, onto, side="left", part="orthogonal")
    assert torch.equal(written["b"], update["b"])
    assert kept.shares["b"] == 1.0
    assert torch.allclose(written["a"][:3], torch.zeros(3, 3), atol=1e-6)
    assert torch.allclose(written["a"][3], update["a"][3])
    assert float(written["norm"][0].abs()) < 1e-6
    assert torch.allclose(written["norm"][1:], update["norm"][1:])


def test_errors() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.interventions.update_projection import frames, project_update
    from subspace_probe.linalg.modes import modes

    spectrum = modes(_update())
    assert spectrum is not None
    with pytest.raises(ConfigError, match="ranks 1 to 7"):
        frames("top", spectrum, 8)
    with pytest.raises((ConfigError, TypeError), match="inside"):
        project_update(_update(), frames("top", spectrum, 1), side="left", part="inside")  # type: ignore[arg-type]
