"""`subspace-probe demo`: the first study on the bundled organism, whose true answer is known."""

from pathlib import Path
from typing import Annotated

import typer

from subspace_probe.cli.options import PROGRESS, Seed, open_model

MODEL, STUDY, PRESET = "organism:chat", "harmfulness", "tiny"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.json and report.html.")] = Path(
        "demo-report"
    ),
    seed: Seed = 0,
) -> None:
    """Ask the bundled model whether it encodes harmfulness and refusal apart, and uses them. About a minute."""
    from subspace_probe.cli.outputs import save_report, writable_folder
    from subspace_probe.cli.study import configured
    from subspace_probe.cli.terminal import say, show_report, wrote

    writable_folder(out)
    from subspace_probe.studies import STUDIES

    chosen = STUDIES.load(STUDY)
    say((chosen.title, "bold"), (f"  {chosen.citation}", "dim"))
    model = open_model(MODEL)
    report = chosen.run(model, configured(chosen, STUDY, {}, preset=PRESET, seed=seed), progress=PROGRESS.get())
    paths = save_report(report, out)
    show_report(report)
    wrote(*paths)
    say(
        ("Now your own model: ", "dim"), f"subspace-probe study {STUDY} --model <folder or hub id> --contrast <prompts>"
    )
