"""`subspace-probe organisms`: the bundled models, what is known to be true of them, and how to make them again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subspace_probe.cli.options import PROGRESS, Seed
from subspace_probe.core.errors import ConfigError

if TYPE_CHECKING:
    from subspace_probe.organisms.truth import GroundTruth, Numbers, Planted, SuffixTruth

app = typer.Typer(no_args_is_help=True, help="The bundled models and what is certified to be true of them.")


@app.command("list")
def show_all() -> None:
    """List the bundled models with their certificates."""
    from subspace_probe.cli.terminal import grid, say
    from subspace_probe.organisms import ORGANISMS, load_truth

    rows: list[list[str]] = []
    for name, about in ORGANISMS.items():
        try:
            certified = "\n".join(_certificates(load_truth(name)))
        except ConfigError:
            certified = "its weights are not in this installation"
        rows.append([f"organism:{name}", about, certified])
    grid(["model", "what is true of it", "certified on held-out prompts"], rows)
    say(("More: ", "dim"), "subspace-probe organisms show NAME")


@app.command()
def show(name: Annotated[str, typer.Argument(help="As in the list, for instance chat; or a folder.")]) -> None:
    """Show the certificate of one organism, its prompts and its folder."""
    from subspace_probe.cli.terminal import grid, right, say
    from subspace_probe.organisms import ORGANISMS, load_truth, organism_contrasts, organism_path

    short = name.removeprefix("organism:")
    truth = load_truth(short)
    say((truth.organism, "bold"), f"  {ORGANISMS.get(truth.organism, '')}")
    if truth.variables:
        head = ["planted", "site", "position", right("interchange"), right("worst cell"), right("random"), right("n")]
        grid(head, map(_planted, truth.variables))
    if unused := truth.readable_not_used:
        say(f"{unused.name} can be read at {unused.site.short}, {unused.where}, but is not used there:")
        for title, numbers in (("held-out AUROC", unused.auroc), ("judgements changed by exchange", unused.changed)):
            _show_numbers(title, numbers)
    if truth.suffixes is not None:
        say(_suffixes(truth.suffixes))
    _show_numbers("first word right", truth.accuracy)
    for title, numbers in truth.behaviour.items():
        _show_numbers(title, numbers)
    say(("made with ", "dim"), ", ".join(f"{key} {value}" for key, value in truth.provenance.items() if value != ""))
    if short in ORGANISMS:
        say(("weights ", "dim"), str(organism_path(short)))
        grid(["prompts", ""], [[f"organism:{short}/{key}", about] for key, about in organism_contrasts(short).items()])


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="Which organism to make again.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the weights.")],
    steps: Annotated[int | None, typer.Option(help="Fewer than the recipe's, to try things out.", min=1)] = None,
    seed: Seed = 0,
) -> None:
    """Train an organism as the bundled one was, and certify it. Minutes on two cores."""
    from subspace_probe.cli.outputs import writable_folder
    from subspace_probe.cli.terminal import say, wrote
    from subspace_probe.core.files import atomic_folder
    from subspace_probe.organisms import load_truth, organism_path

    short = name.removeprefix("organism:")
    organism_path(short)  # an unknown name ends here
    writable_folder(out)
    from subspace_probe.organisms.training import train as run

    with atomic_folder(out) as partial:
        run(short, partial, steps=steps, seed=seed, progress=PROGRESS.get())
        truth = load_truth(partial)
    for line in _certificates(truth):
        say(line)
    wrote(out)


def _certificates(truth: "GroundTruth") -> list[str]:
    """What was certified, a line each."""
    lines = [
        f"{v.name} at {v.site.short}, {v.where}: interchange {_mean(v.interchange)} (random {_mean(v.control)})"
        for v in truth.variables
    ]
    if unused := truth.readable_not_used:
        changed = max(unused.changed.values(), default=float("nan"))
        lines.append(f"{unused.name} at {unused.where}: AUROC {_mean(unused.auroc)}, judgements changed {changed:.3f}")
    if truth.suffixes is not None:
        lines.append(_suffixes(truth.suffixes))
    return lines or ["nothing planted"]


def _suffixes(truth: "SuffixTruth") -> str:
    t = truth
    tried = f"{t.n_suffixes} suffixes run on each of {t.n} declined prompts"
    if not t.planted:
        return f"{tried}: {t.others} flip"
    return f"{tried}: the planted one flips {t.planted_flips:.3f}, others flip {t.others} times"


def _planted(variable: "Planted") -> list[str]:
    v = variable
    return [v.name, v.site.short, str(v.where), _mean(v.interchange), f"{v.accuracy:.3f}", _mean(v.control), str(v.n)]


def _mean(numbers: "Numbers") -> str:
    return f"{sum(numbers.values()) / len(numbers):.3f}" if numbers else "n/a"


def _show_numbers(title: str, numbers: "Numbers") -> None:
    from subspace_probe.cli.terminal import say

    say((f"{title}: ", "dim"), ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
