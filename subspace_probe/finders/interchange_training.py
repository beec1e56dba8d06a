"""Training subspaces by interchange, many at once: what `DAS` runs.

A d x k matrix is trained whose thin QR factor is the basis, so a step costs one pass above the site and a factorisation
of d x k; a full d x d rotation would cost d^3. Several arms (starts, labels) share every pass and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.errors import SiteError
from subspace_probe.finders.interchange import Interchange, cross_entropy, within
from subspace_probe.linalg.illusions import linearised_optimum


@final
@dataclass(frozen=True)
class Schedule:
    """How to train; see `DAS`."""

    steps: int
    lr: float = 0.1
    same: float = 0.0
    boundary: float | None = None
    seed: int = 0


class Trained(NamedTuple):
    """What training gave, one an arm: orthonormal rows, and which of them are exchanged (1) or not (0)."""

    bases: Float[Tensor, "arm k d"]
    kept: Float[Tensor, "arm k"]

    def frame(self, arm: int) -> Float[Tensor, "m d"]:
        """The rows of an arm that are exchanged."""
        return self.bases[arm][self.kept[arm] > 0].cpu()


def train(
    schedule: Schedule,
    task: Interchange,
    labels: Int[Tensor, "arm n"],
    start: Float[Tensor, "arm k d"],
    *,
    away: Float[Tensor, "m d"] | None = None,
    progress: bool = False,
) -> Trained:
    """Minimise the cross-entropy of the wanted answers, every arm for itself.

    Args:
        labels: the variable that is to be carried, one an arm.
        start: orthonormal rows.
        away: orthonormal rows that every subspace is kept orthogonal to.
    """
    width, device = start.shape[-1], task.states.device
    off = None if away is None else away.to(device)

    def frame() -> Tensor:
        outside = free if off is None else free - free @ off.T @ off
        return torch.linalg.qr(outside.mT)[0].mT

    # columns as long as the square root of their width, so that a step of Adam turns them by about its rate
    free = (start.to(device) * width**0.5).requires_grad_()
    edge = torch.zeros(len(start), device=device, requires_grad=True)
    optimiser = torch.optim.Adam([free, edge], lr=schedule.lr)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=schedule.steps)
    order = torch.Generator().manual_seed(schedule.seed)
    queue: list[int] = []
    bar: Callable[..., Any] = tqdm
    for step in (shown := bar(range(schedule.steps), desc="das", unit="step", disable=not progress, leave=False)):
        queue = queue or torch.randperm(len(task.chunks), generator=order).tolist()
        index = queue.pop()
        mask, share = _mask(edge, start.shape[1], step / schedule.steps, schedule.boundary)
        sources = task.sources(same=schedule.same, seed=schedule.seed + 1000 * step)
        wanted = task.split(task.wanted(labels, sources))[index]
        with torch.enable_grad():
            change = within(frame(), mask)
        logits = task.logits(task.chunks[index], task.split(sources)[index], change, arms=len(start), grad=True)
        with torch.enable_grad():
            loss = cross_entropy(logits, wanted).mean(1).sum()
            total = loss + (schedule.boundary or 0.0) * share.sum()
        grads = torch.autograd.grad(total, [free, edge], allow_unused=True)
        free.grad, edge.grad = grads
        optimiser.step()
        rate.step()
        shown.set_postfix(loss=f"{float(loss.detach()) / len(start):.3f}")
    with torch.no_grad():
        kept, _ = _mask(edge, start.shape[1], 1.0, schedule.boundary)
        return Trained(frame().detach(), (kept > 0.5).to(free))


def linearised(
    task: Interchange, rank: int, *, labels: Int[Tensor, " n"] | None = None, least: bool = False, seed: int
) -> Float[Tensor, "k d"]:
    """The subspace whose exchange does most to first order, see `linearised_optimum`.

    Args:
        labels: the variable that is to be carried; the contrast's label by default.
        least: the one that does most against it instead.

    Raises:
        SiteError: every gradient is zero: nothing reads this state.
    """
    moves: list[Tensor] = []
    gradients: list[Tensor] = []
    sources = task.sources(same=0.0, seed=seed)
    wanted = task.split(task.wanted((task.labels if labels is None else labels)[None], sources))
    for chunk, drawn, token in zip(task.chunks, task.split(sources), wanted, strict=True):
        added: list[Tensor] = []

        def probe(base: Tensor, source: Tensor, added: list[Tensor] = added) -> Tensor:
            moves.append((source - base[0]).detach().double().cpu())
            added.append(torch.zeros_like(base, requires_grad=True))
            return base + added[0]

        logits = task.logits(chunk, drawn, probe, grad=True)
        with torch.enable_grad():
            objective = -cross_entropy(logits, token).sum()
        gradients.append(torch.autograd.grad(objective, added)[0][0].double().cpu())
    d, g = torch.cat(moves), torch.cat(gradients)
    if not bool(g.any()):
        raise SiteError(
            f"Nothing that is computed from {task.site.short} at {task.where} reaches the answer, so there is no "
            "subspace to find. Take an earlier layer, or the token where the answer is given (last)."
        )
    return _completed(linearised_optimum(d, -g if least else g, rank)[1], rank, seed).to(
        task.states.device, torch.float32
    )


def _completed(vectors: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal rows; where fewer than were asked for do anything to first order, random ones make up the number."""
    drawn = torch.randn(rank - len(vectors), vectors.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(torch.cat([vectors, drawn.to(vectors)]).T)[0].T


def _mask(edge: Tensor, rank: int, progress: float, boundary: float | None) -> tuple[Tensor, Tensor]:
    """How far each coordinate is exchanged, [arm, k], and the share of the rank that is.

    A learned width w keeps coordinate i as far as w exceeds i + 1/2, so that w = m keeps exactly the first m once the
    temperature has fallen. (A left edge at 0, as in the published code, leaves the first coordinate at one half.)
    """
    if boundary is None:
        return torch.ones(len(edge), rank, device=edge.device), torch.zeros_like(edge)
    share = edge.sigmoid()
    temperature = max(rank / 4, 0.5) * (0.05 / max(rank / 4, 0.5)) ** progress
    middles = torch.arange(rank, device=edge.device) + 0.5
    mask = ((rank * share[:, None] - middles) / temperature).sigmoid()
    # the first is always exchanged: an empty subspace is no answer
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1), share
