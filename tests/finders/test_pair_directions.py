"""A direction for each pair, against closed forms and against what it is fitted to."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel


def test_one_direction_a_pair_turns_answers_around(chat: "HookedModel") -> None:
    """Better than where it starts, which is the closed-form bisector, and than random directions (the control)."""
    import subspace_probe as sp
    from subspace_probe.finders.interchange import Interchange
    from subspace_probe.finders.pair_directions import pair_directions

    facts = sp.load_contrast("organism:chat/knob", n=16, split="test")
    task = Interchange(chat, facts, sp.Site(2), sp.LAST, list(range(16)))
    partner = torch.arange(16) ^ 1
    trained = pair_directions(task, partner, steps=30)
    assert torch.allclose(trained.norm(dim=1), torch.ones(16), atol=1e-5)
    start = pair_directions(task, partner, steps=1)

    def loss(units: torch.Tensor) -> torch.Tensor:
        def change(base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            return base + ((source - base[0]) * units).sum(1, keepdim=True) * units

        return task.score(change, partner, task.labels[None])[0][0]

    random = torch.nn.functional.normalize(torch.randn(16, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    assert bool((loss(trained) <= loss(start) + 1e-5).all())
    assert float(loss(trained).mean()) < 0.5 * float(loss(random).mean())


def test_it_starts_at_the_closed_form(chat: "HookedModel") -> None:
    """After one step the best state seen is the start: D/|D| + G/|G| with G by central differences."""
    import subspace_probe as sp
    from subspace_probe.finders.interchange import Interchange
    from subspace_probe.finders.pair_directions import pair_directions

    facts = sp.load_contrast("organism:chat/knob", n=2, split="test")
    site = sp.Site(3)
    task = Interchange(chat, facts, site, sp.LAST, [0, 1])
    partner = torch.tensor([1, 0])
    start = pair_directions(task, partner, steps=1)
    step, width = 2e-2, task.states.shape[1]
    gradient = torch.zeros(2, width)
    for axis in range(width):
        unit = torch.zeros(width)
        unit[axis] = step
        up, down = (task.score(lambda b, _, m=move: b + m, partner, task.labels[None])[0][0] for move in (unit, -unit))
        gradient[:, axis] = (down - up) / (2 * step)
    move = task.states[partner] - task.states
    wanted = torch.nn.functional.normalize(
        torch.nn.functional.normalize(move, dim=1) + torch.nn.functional.normalize(gradient, dim=1), dim=1
    )
    assert float((start * wanted).sum(1).min()) > 0.99
    assert float((start * torch.nn.functional.normalize(move, dim=1)).sum(1).max()) < 0.99  # control: not D alone
