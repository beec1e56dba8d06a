"""Loading models: a directory, a hub id or a model already loaded, behind one of the backends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from subspace_probe.core.errors import BackendError, StoreError
from subspace_probe.core.registry import Registry
from subspace_probe.models.hooked import HookedModel as HookedModel

BACKENDS = Registry(
    "backend",
    {
        "native": "subspace_probe.models.native:NativeModel",
        "transformer_lens": "subspace_probe.models.lens:LensModel",
        "nnsight": "subspace_probe.models.nns:NNsightModel",
    },
    group="subspace_probe.backends",
)
"""Name to class. A new backend is one file and one line here."""

METADATA = "subspace_probe.json"
"""File in a model's folder that says which words stand for which behaviour."""


def load_model(
    model: Any,
    *,
    backend: str = "native",
    tokenizer: Any = None,
    dtype: Any = "auto",
    device: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    words: Mapping[str, tuple[str, ...]] | None = None,
    **kwargs: Any,
) -> HookedModel:
    """Load a model and wrap it.

    Args:
        model: a local directory, a hub id, or a loaded Hugging Face model (then `tokenizer` too).
        backend: a name from `BACKENDS`.
        tokenizer: where it is not beside the model.
        dtype: the checkpoint's own by default.
        device: for instance "cuda"; default is where Transformers puts it.
        template_kwargs: options of the chat template, such as `enable_thinking=False`.
        words: words that stand for behaviours: `{"refusal": ("Sorry",)}`. They override the folder's metadata.
        kwargs: passed to `from_pretrained` (`device_map`, `attn_implementation`, `revision`, ...).

    Raises:
        UnknownName: no such backend.
        StoreError: no such directory or hub model.
        BackendError: a family without a layout, or a model without a tokenizer.
    """
    make = BACKENDS.load(backend)
    directory = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    if isinstance(model, str | Path):
        hf, tokenizer = _load(model, tokenizer, dtype=dtype, **kwargs)
        name = str(model)
    else:
        hf, name = model, str(getattr(model, "name_or_path", "") or type(model).__name__)
        if tokenizer is None:
            raise BackendError("A loaded model was given without a tokenizer. Pass tokenizer=AutoTokenizer...")
    if device is not None:
        hf = hf.to(device)
    known = _metadata(directory) if directory else {}
    return HookedModel(
        make(hf, name=name),
        tokenizer,
        template_kwargs=template_kwargs,
        words={**known, **(words or {})},
        directory=directory,
    )


def _load(model: str | Path, tokenizer: Any, **kwargs: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    local = isinstance(model, Path) or Path(model).is_absolute() or model.startswith(".")
    if local and not Path(model).is_dir():
        raise StoreError(f"No model folder {str(model)!r}. Give a folder with config.json, or a hub id.")
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    try:
        config = AutoConfig.from_pretrained(model, **revision)
        kind: Any = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
        loaded, info = kind.from_pretrained(model, output_loading_info=True, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise StoreError(
            f"Cannot load {str(model)!r}: {first} Give 'organism:chat', a folder with config.json, or a hub id."
        ) from None
    # Transformers only warns, and fills them with random numbers; an encoder's pooler is behind every site
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BackendError(
            f"{str(model)!r} lacks {len(missing)} of the weights of {type(loaded).__name__} ({shown}). "
            "The checkpoint is of another kind of model, or incomplete."
        )
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **revision)
        except Exception as error:
            # the tokenizers library raises a bare Exception for a file that it cannot make sense of
            if not isinstance(error, OSError | ValueError | LookupError) and type(error) is not Exception:
                raise
            cause = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise StoreError(
                f"Cannot load a tokenizer from {str(model)!r}: {cause} Put tokenizer.json beside the model, or pass "
                "tokenizer=..."
            ) from None
    return loaded.eval(), tokenizer


def _metadata(directory: Path) -> dict[str, tuple[str, ...]]:
    """Behaviour words of a model folder, where it has any."""
    path = directory / METADATA
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return {name: tuple(map(str, words)) for name, words in body.get("words", {}).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise StoreError(f"{path} is not valid metadata: {error}. It is a JSON object with 'words'.") from None
