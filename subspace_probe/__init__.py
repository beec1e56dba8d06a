"""Find directions and subspaces in language-model activations, intervene on them, and check that they are real.

>>> import subspace_probe as sp
>>> model = sp.load_model("organism:chat")
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.models.hooked import HookedModel

__version__ = "0.1.0"

_NAMES = {
    "Site": "core.sites",
    "resid_pre": "core.sites",
    "resid_post": "core.sites",
    "Where": "core.tokens",
    "ALL": "core.tokens",
    "PROMPT": "core.tokens",
    "GENERATED": "core.tokens",
    "INSTRUCTION": "core.tokens",
    "T_INST": "core.tokens",
    "T_POST_INST": "core.tokens",
    "LAST": "core.tokens",
    "at": "core.tokens",
    "span": "core.tokens",
    "after": "core.tokens",
    "step": "core.tokens",
    "Prompt": "core.prompts",
    "Contrast": "core.contrasts",
    "Activations": "core.activations",
    "Memory": "core.captures",
    "Folder": "store.folder",
    "Subspace": "core.subspaces",
    "export_gguf": "store.control_vectors",
    "import_gguf": "store.control_vectors",
    "verify_gguf": "store.gguf_rules",
    "import_direction": "store.published",
    "Finding": "core.findings",
    "Report": "core.reports",
    "HookedModel": "models.hooked",
    "MeanDifference": "finders.mean_difference",
    "PCA": "finders.pca",
    "FactorSubspaces": "finders.factors",
    "LDA": "finders.lda",
    "LinearProbe": "finders.linear_probe",
    "LEACE": "finders.leace",
    "SAELatents": "finders.sae_latents",
    "DAS": "finders.das",
    "ActiveSubspace": "finders.active_subspace",
    "WeightDelta": "finders.weight_delta",
    "find": "finders.sweep",
    "compare_subspaces": "diagnostics.similarity",
    "Source": "interventions.sources",
    "Patch": "interventions.patch",
    "Steer": "interventions.steer",
    "KnobClamp": "interventions.knob",
    "Score": "interventions.rules",
    "AllOf": "interventions.rules",
    "AnyOf": "interventions.rules",
    "Not": "interventions.rules",
    "Ablate": "interventions.ablate",
    "Reroute": "interventions.reroute",
    "HalfSpace": "interventions.targets",
    "Move": "interventions.moves",
    "path_patch": "interventions.path_patch",
    "patch_sweep": "interventions.patch_sweep",
    "attribution": "interventions.attribution",
    "search_layers": "interventions.layer_search",
    "orthogonalize_weights": "interventions.orthogonal",
    "save_interventions": "interventions.files",
    "load_interventions": "interventions.files",
    "TokenSearch": "interventions.token_search",
    "EmbeddingSearch": "interventions.embedding_search",
    "measure": "diagnostics.measuring",
    "measure_patch": "diagnostics.patching",
    "strength_sweep": "diagnostics.strengths",
    "eligibility": "diagnostics.eligibility",
    "ladder": "diagnostics.ladder",
    "audit": "diagnostics.auditing",
    "explain_no_effect": "diagnostics.explaining",
    "LatentGuard": "guard.guard",
    "LatentProbe": "guard.probe",
    "ResidualGate": "guard.residual_gate",
}
_MODULES = ("dictionaries", "figures", "guard", "linalg", "organisms", "studies")

__all__ = ["__version__", "load_contrast", "load_model", *_NAMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Names load on first use, so that the import costs nothing."""
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def load_model(model: Any, **kwargs: Any) -> "HookedModel":
    """Load a model: `"organism:chat"`, a local directory, a hub id, or a loaded Hugging Face model with its tokenizer.

    Args:
        model: what to load. Organisms are tiny models bundled with this package whose true answers are known.
        kwargs: see `subspace_probe.models.load_model`: `backend`, `tokenizer`, `dtype`, `device`, `template_kwargs`,
            `words`, and whatever `from_pretrained` takes.

    Raises:
        UnknownName: no such organism or backend.
        StoreError: no such directory or hub model.
        BackendError: a family that is not supported.
    """
    from subspace_probe.models import load_model as load

    if isinstance(model, str) and model.startswith("organism:"):
        from subspace_probe.organisms import organism_path

        loaded = load(organism_path(model.removeprefix("organism:")), **kwargs)
        return loaded.named(model)
    return load(model, **kwargs)


def load_contrast(name: str | Path, **kwargs: Any) -> "Contrast":
    """Load prompts with labels.

    Args:
        name: `"organism:chat/requests"`, a `.jsonl` or `.csv` file with `prompt` (or `messages`), `label` and an
            optional `pair`, or a Hugging Face dataset by name or local path.
        kwargs: `split`, `n` and `seed` for organisms; `columns` for files; also `split` for datasets.

    Raises:
        UnknownName: no such contrast.
        StoreError: no such file or dataset.
        DataError: malformed rows, each with its line.
    """
    text = str(name)
    if text.startswith("organism:"):
        from subspace_probe.organisms import organism_contrast

        return organism_contrast(text.removeprefix("organism:"), **kwargs)
    from subspace_probe.data import load_contrast as load

    return load(text, **kwargs)
