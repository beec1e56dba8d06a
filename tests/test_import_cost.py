"""`import subspace_probe` is cheap: it loads none of the libraries that take seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("transformer_lens", "sae_lens", "nnsight", "plotly", "sklearn", "transformers", "typer")


def heavy_after(statement: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has loaded after running `statement`."""
    program = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after("import subspace_probe") == set()


def test_the_check_above_can_fail() -> None:
    assert heavy_after("import subspace_probe, plotly, typer") == {"plotly", "typer"}
