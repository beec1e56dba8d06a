"""What every test shares. It must not import the package at module level.

The jaxtyping hook (`--jaxtyping-packages` in pyproject.toml) checks only modules imported after it is installed, so
`subspace_probe` is imported inside fixtures and in test modules, never here at the top.
"""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything can import huggingface_hub, which reads these once: a test that needs a network is a broken test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked subprocesses otherwise print a warning about deadlocks
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses too: threads of two processes on two cores wait for each other

import pytest
import torch

from tests import annotations

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260k"

LONGEST = {
    "test_harmfulness.py", "test_wheel.py", "test_examples.py", "test_backends.py",
    "test_refusal_direction.py", "test_mechanism.py", "test_rerouting.py", "test_latent_guard.py",
    "test_context_knob.py", "test_sae_evaluation.py", "test_illusions.py",
}  # fmt: skip
"""Files of half a minute and more, each one piece of work."""

# Models here are tiny: more threads cost more in hand-over than they save, and would change the order of sums.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first, so that no worker sits idle at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What imports have made stays: looking for garbage among it was a fifth of the time of the backend contracts."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    annotations.start_anew()


@pytest.fixture(scope="session")
def chat() -> "HookedModel":
    """The organism that ships with the package: refuses or complies, with known ground truth."""
    import subspace_probe as sp

    return sp.load_model("organism:chat")


@pytest.fixture(scope="session")
def stories() -> "HookedModel":
    """A real pretrained model of 260 thousand parameters, where a copy of it lies beside the repository."""
    if not STORIES.is_dir():
        pytest.skip("no stories260k model in ../shared/models: this check against a pretrained model needs it")
    import subspace_probe as sp

    return sp.load_model(str(STORIES))
