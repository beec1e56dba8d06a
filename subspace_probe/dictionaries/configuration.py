"""What a sparse autoencoder's `cfg.json` says, read without the library that wrote it.

The format is that of SAELens 6 (https://github.com/decoderesearch/SAELens); files of earlier versions, which keep
everything on one level, are brought to it. What changes a result and is not computed here is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast, final, get_args

from subspace_probe.core.errors import ConfigError

Architecture = Literal["standard", "jumprelu", "topk", "gated"]
Normalisation = Literal["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]
Reshaping = Literal["none", "hook_z"]

_ELSEWHERE = {
    "batchtopk": "it is a training checkpoint; save_inference_model writes it as a jumprelu one",
    "matryoshka_batchtopk": "it is a training checkpoint; save_inference_model writes it as a jumprelu one",
    "covariance_whitening": "the whitening matrix is not in the file; save_inference_model folds it into the weights",
}
_METADATA = (
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_head_index"),
    *("hf_hook_name", "hook_name_out", "hook_head_index_out", "hf_hook_name_out", "prepend_bos", "context_size"),
    *("exclude_special_tokens", "seqpos_slice", "dataset_path", "neuronpedia_id"),
    *("sae_lens_version", "sae_lens_training_version"),
)
"""Keys that stand at the top level before version 6, and in `metadata` since."""


@final
@dataclass(frozen=True)
class Configuration:
    """How a sparse autoencoder computes.

    Attributes:
        d_in: width of the states.
        d_sae: number of latents.
        apply_b_dec_to_input: whether the decoder's bias is taken off the input.
        normalize_activations: what is done to a state before it is encoded, and undone after it is decoded.
        reshape_activations: "hook_z" where states may come by head, [..., n_heads, d_head].
        k: latents that are kept in each row; topk only.
        rescale_acts_by_decoder_norm: whether latents are measured in units of their decoder row's length; topk only.
        metadata: model, hook name, training; plain JSON values.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool = True
    normalize_activations: Normalisation = "none"
    reshape_activations: Reshaping = "none"
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _check({each.name: getattr(self, each.name) for each in fields(self)})

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Configuration":
        """Read the contents of a `cfg.json`, of version 6 or earlier.

        Raises:
            ConfigError: a key that is missing, or a value that is not supported, by name.
        """
        metadata = body.get("metadata", {})
        if not isinstance(metadata, Mapping):
            raise ConfigError(f"The key 'metadata' of a cfg.json holds {metadata!r}. It must be an object.")
        known = str(body.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
        body = dict(body) if known.split(".")[0].isdigit() and int(known.split(".")[0]) >= 6 else _modern(body)
        for name in ("architecture", "d_in", "d_sae"):
            if name not in body:
                raise ConfigError(f"A cfg.json lacks the key {name!r}; it has {', '.join(sorted(body)) or 'none'}.")
        topk = body["architecture"] == "topk"
        values: dict[str, Any] = {
            "architecture": body["architecture"],
            "d_in": body["d_in"],
            "d_sae": body["d_sae"],
            "apply_b_dec_to_input": body.get("apply_b_dec_to_input", True),
            "normalize_activations": body.get("normalize_activations", "none"),
            "reshape_activations": body.get("reshape_activations", "none"),
            # both mean something to one architecture only; the others carry them from training, already folded in
            "k": body.get("k") if topk else None,
            "rescale_acts_by_decoder_norm": body.get("rescale_acts_by_decoder_norm", False) if topk else False,
            "metadata": dict(cast("Mapping[str, Any]", body.get("metadata", {}))),
        }
        _check(values)
        return cls(**values)

    def to_json(self, dtype: str) -> dict[str, Any]:
        """The contents of a `cfg.json` that SAELens 6 reads too."""
        body: dict[str, Any] = {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": dtype,
            "device": "cpu",
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": self.normalize_activations,
            "reshape_activations": self.reshape_activations,
            # without a version the reader takes the file for an old one, and drops most of its metadata
            "metadata": {"sae_lens_version": _format_version(), **self.metadata},
        }
        if self.architecture == "topk":
            body |= {"k": self.k, "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}
        return body


def _check(values: Mapping[str, Any]) -> None:
    for key, known in (
        ("architecture", get_args(Architecture)),
        ("normalize_activations", get_args(Normalisation)),
        ("reshape_activations", get_args(Reshaping)),
    ):
        _require(key, values[key], known)
    topk = values["architecture"] == "topk"
    for name in ("d_in", "d_sae", *(("k",) if topk else ())):
        value: object = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"A sparse autoencoder has {name}={value!r}. It must be a whole number from 1 on.")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(values[name], bool):
            raise ConfigError(f"A sparse autoencoder has {name}={values[name]!r}. It must be true or false.")
    if topk and values["k"] > values["d_sae"]:
        raise ConfigError(f"A sparse autoencoder has k={values['k']}, but only d_sae={values['d_sae']} latents.")


def _require(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        reason = f" ({_ELSEWHERE[value]})" if isinstance(value, str) and value in _ELSEWHERE else ""
        raise ConfigError(
            f"A sparse autoencoder has {key}={value!r}, which is not supported{reason}. Supported: {', '.join(known)}."
        )


def _modern(body: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from before version 6 in today's keys."""
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    new: dict[str, Any] = {"architecture": "standard", **{renamed.get(key, key): value for key, value in body.items()}}
    activation, settings = new.get("activation_fn", "relu"), new.get("activation_fn_kwargs") or {}
    if activation == "topk" and settings.get("k") is not None:
        new |= {"architecture": "topk", "k": settings["k"]}
    elif activation not in ("relu", "topk", None):
        raise ConfigError(f"A sparse autoencoder has activation_fn={activation!r}, which is not supported, only relu.")
    scaled = new.get("normalize_activations")
    if scaled is None or isinstance(scaled, bool):
        new["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    name = str(new.get("hook_name") or "")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in name else "none")
    above = {key: new[key] for key in _METADATA if key in new}
    new["metadata"] = {**above, **(new.get("metadata") or {})}
    return new


def _format_version() -> str:
    try:
        return version("sae-lens")
    except PackageNotFoundError:
        return "6.0.0"
