"""`subspace-probe backends`: what runs the passes, and whether it all agrees on a model."""

from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli.options import PROGRESS, Device, Dtype, ModelName, Template, open_model

if TYPE_CHECKING:
    from subspace_probe.models.backend import Backend
    from subspace_probe.models.comparing import Difference

app = typer.Typer(no_args_is_help=True, help="The hooking stacks that can run a model, and whether they agree.")

PROMPTS = ("The weather today is", "She went to the market and bought three apples and", "Two plus two makes")


@app.command("list")
def show_all() -> None:
    """List the backends."""
    from subspace_probe.cli.terminal import grid
    from subspace_probe.models import BACKENDS

    grid(["backend", "class"], [[name, BACKENDS.load(name).__doc__.split("\n")[0]] for name in BACKENDS])


@app.command()
def compare(
    model: ModelName,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt. Repeatable.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="A block; the first, middle and last by default.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Every site, not only the worst of each stream.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    template: Template = None,
) -> None:
    """Largest differences to the native backend: reads, edits, gradients through edits, and text under an edit.

    Exit code 1 where one is larger than the model's dtype explains.
    """
    from tqdm.auto import tqdm

    from subspace_probe.cli.terminal import complain, say
    from subspace_probe.core.errors import BackendError
    from subspace_probe.core.sites import Site
    from subspace_probe.models import BACKENDS
    from subspace_probe.models.comparing import compare as run
    from subspace_probe.models.comparing import tolerance

    loaded = open_model(model, device=device, dtype=dtype, template=template)
    last = loaded.spec.n_layers - 1
    layers = sorted({Site(i).resolve(last + 1).layer for i in layer or (0, (last + 1) // 2, last)})
    others: dict[str, Backend] = {}
    for name in BACKENDS:
        if name != "native":
            try:
                others[name] = BACKENDS.load(name)(loaded.backend.hf, name=model)
            except BackendError as error:
                complain(f"{name} does not run this model: {error}")
    if not others:
        complain("nothing was compared: no other backend runs this model.")
        raise typer.Exit(1)
    found = list(
        tqdm(
            run(loaded.backend, others, loaded.tokens(tuple(prompt or PROMPTS)), layers=layers),
            desc="compare", unit="comparison", disable=not PROGRESS.get(), leave=False,
        )
    )  # fmt: skip
    limit = tolerance(loaded.backend)
    _show(found, sorted(others), details, limit)
    worst = max((difference.worst() for difference in found), default=0.0)
    silent = sorted(name for name in others if not any(isinstance(each.found[name], float) for each in found))
    if silent:
        complain(f"nothing was compared for {', '.join(silent)}: every comparison was refused.")
        raise typer.Exit(1)
    agree = worst <= limit
    say(
        ("They agree: " if agree else "They do not agree: ", "bold green" if agree else "bold red"),
        f"the largest of {len(found)} differences is {worst:.2g}, in units of the largest value; "
        f"{loaded.spec.family} in {str(loaded.backend.dtype)[6:]} explains {limit:.0e}.",
    )
    if not agree:
        raise typer.Exit(1)


def _show(found: "list[Difference]", names: list[str], details: bool, limit: float) -> None:
    from rich.text import Text

    from subspace_probe.cli.terminal import grid, right

    groups: dict[tuple[str, str], list[Difference]] = {}
    for each in found:
        stream = each.what if details or each.kind == "text" else each.what.partition(".")[2]
        groups.setdefault((each.kind, stream), []).append(each)
    rows: list[list[str | Text]] = []
    for (kind, what), members in groups.items():
        if rows and str(rows[-1][0]) != kind:
            rows.append([])
        cells: list[str | Text] = []
        for name in names:
            numbers = [value for each in members if isinstance(value := each.found[name], float)]
            worst = max(numbers, default=None)
            cells.append("refused" if worst is None else Text(f"{worst:.1e}", style="" if worst <= limit else "red"))
        rows.append([kind, what, *cells])
    grid(["compared with native", "at" if details else "at (worst layer)", *map(right, names)], rows)
