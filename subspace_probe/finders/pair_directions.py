"""One direction for each pair of prompts, trained on that pair alone: how far a site can be bent to any purpose.

Makelov et al. 2023, arXiv:2311.17030, section 6 (facts). What such a direction does on its own pair says nothing about
the model's mechanism, since it is judged by what it was trained on; it is what rank-one edits of the same strength do.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_probe.finders.interchange import Chunk, Interchange, cross_entropy
from subspace_probe.linalg.illusions import bisector


def pair_directions(
    task: Interchange, sources: Int[Tensor, " bases"], *, steps: int = 60, lr: float = 0.1
) -> Float[Tensor, "bases d"]:
    """The unit direction whose exchange makes each base answer as its source does, one a base.

    Starts from what does most to first order (`bisector`) and minimises the cross-entropy of the source's answer, by
    Adam with a rate that falls linearly to a tenth. (The published objective, a difference of logits, is unbounded.)

    Args:
        task: the bases, at one site.
        sources: row of each base's source in the task's contrast.
        steps: of training.
        lr: about the angle, in radians, that a direction turns in the first step.

    Returns:
        Unit rows in the order of the bases; zero where no gradient reaches the answer.
    """
    wanted = task.split(task.wanted(task.labels[None], sources))
    found: list[Tensor] = []
    for chunk, drawn, token in zip(task.chunks, task.split(sources), wanted, strict=True):
        start, moves = torch.zeros_like(task.states[chunk.rows]), task.states[drawn] - task.states[chunk.rows]
        gradient = _gradient(task, chunk, drawn, token, start)[1]
        free = bisector(moves, gradient) * start.shape[1] ** 0.5
        best, least = free, torch.full((len(free),), float("inf"))
        free = free.clone().requires_grad_()
        optimiser = torch.optim.Adam([free], lr=lr)
        rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=steps)
        for _ in range(steps):
            with torch.enable_grad():
                unit = torch.nn.functional.normalize(free, dim=1)
                shift = (moves * unit).sum(1, keepdim=True) * unit
            loss, gradient = _gradient(task, chunk, drawn, token, shift.detach())
            best, least = torch.where((loss < least)[:, None], free.detach(), best), torch.minimum(loss, least)
            (free.grad,) = torch.autograd.grad(shift, free, -gradient)
            optimiser.step()
            rate.step()
        found.append(torch.nn.functional.normalize(best, dim=1).cpu())
    return torch.cat(found)


def _gradient(
    task: Interchange, chunk: Chunk, sources: Tensor, token: Tensor, shift: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b d"]]:
    """The loss of bases moved so far, and the gradient of its negative with respect to the states."""
    added = shift.clone().requires_grad_()
    logits = task.logits(chunk, sources, lambda base, _: base + added.to(base), grad=True)
    with torch.enable_grad():
        loss = cross_entropy(logits, token.to(logits.device))[0]
    (gradient,) = torch.autograd.grad(-loss.sum(), added)
    return loss.detach().cpu(), gradient
