"""`subspace-probe compare`: how alike are two directions, and is that anything?"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from subspace_probe.cli.options import Seed


def compare(
    directions: Annotated[
        list[Path], typer.Argument(metavar="DIRECTION...", help="Two or more files that find wrote.")
    ],
    acts: Annotated[
        Path | None, typer.Option("--acts", help="A folder that capture wrote: the null is drawn from its covariance.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Cosine of directions, or overlap of subspaces, beside what unrelated ones of the same data have.

    Every file is compared with the one after it. Without --acts there is no null, and the verdict is unaudited.
    """
    from subspace_probe.cli.terminal import grid, right, say, verdict
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.diagnostics.similarity import compare_subspaces
    from subspace_probe.store import open_activations

    if len(directions) < 2:
        raise ConfigError("One direction was given. Give at least two to compare.")
    rows = None if acts is None else open_activations(acts)
    loaded = {path: Subspace.load(path) for path in directions}
    shown: list[list[object]] = []
    for a, b in pairwise(directions):
        found = compare_subspaces(loaded[a], loaded[b], rows, seed=seed)
        chance = "none" if found.null is None else f"{found.null.low:+.3f} to {found.null.high:+.3f}"
        p = "" if found.null is None else f"{found.p:.2g}"
        shown.append([f"{a.name}, {b.name}", found.kind, f"{found.value:+.3f}", chance, p, verdict(found.verdict)])
    grid(["", "", right("value"), right("95 % by chance"), right("p"), "related?"], shown)  # pyright: ignore[reportArgumentType]
    if rows is None:
        say(("No null: ", "yellow"), "give --acts FOLDER (subspace-probe capture) to learn what chance would give.")
    else:
        say(("Chance: ", "dim"), "unrelated directions with the covariance of these states, not isotropic ones.")
