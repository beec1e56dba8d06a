"""A sparse autoencoder that is used, not trained: states to latents and back.

Encoding and decoding agree with SAELens 6 for every architecture and option, but keep no state between the two: what
undoes a normalisation is taken from the state that `decode` is given, not remembered from the last `encode`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_probe.core.errors import ConfigError, ShapeError, SiteError, StoreError
from subspace_probe.core.keys import content_key
from subspace_probe.core.sites import Site
from subspace_probe.dictionaries.configuration import Architecture, Configuration
from subspace_probe.dictionaries.folders import write_folder
from subspace_probe.dictionaries.hook_names import same_state, site_of

_SHARED: Final = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
_TENSORS: Final[dict[Architecture, dict[str, tuple[str, ...]]]] = {
    "standard": {**_SHARED, "b_enc": ("d_sae",)},
    "topk": {**_SHARED, "b_enc": ("d_sae",)},
    "jumprelu": {**_SHARED, "b_enc": ("d_sae",), "threshold": ("d_sae",)},
    "gated": {**_SHARED, "b_gate": ("d_sae",), "r_mag": ("d_sae",), "b_mag": ("d_sae",)},
}
"""The tensors of each architecture, by the names and shapes of the files."""

_EPS: Final = 1e-5
"""What layer normalisation adds to the deviation; the files do not say, the format does."""


@final
@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A dictionary of directions of one site, and what tells from a state how much of each is in it.

    Attributes:
        configuration: how it computes.
        weights: its tensors, by their names in the file; checked.
    """

    configuration: Configuration
    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        wanted = _TENSORS[self.configuration.architecture]
        if missing := [name for name in wanted if name not in self.weights]:
            raise StoreError(
                f"A {self.architecture} autoencoder lacks the tensors {', '.join(missing)}; "
                f"it has {', '.join(self.weights) or 'none'}. It may be of another architecture."
            )
        if strange := sorted(self.weights.keys() - wanted.keys()):
            raise StoreError(
                f"A {self.architecture} autoencoder has tensors that its architecture does not know: "
                f"{', '.join(strange)}. Known: {', '.join(wanted)}."
            )
        for name, axes in wanted.items():
            shape, found = tuple(getattr(self.configuration, axis) for axis in axes), self.weights[name]
            if tuple(found.shape) != shape:
                raise StoreError(
                    f"The tensor {name} has shape {tuple(found.shape)}; with {self._sizes} it must be {shape}."
                )
            if not bool(found.isfinite().all()):
                raise StoreError(f"The tensor {name} holds non-finite values. The file is damaged, or training failed.")
        if len(kinds := {(value.dtype, value.device) for value in self.weights.values()}) > 1:
            raise StoreError(f"The tensors of an autoencoder must share dtype and device; found {kinds}. Use to().")

    @classmethod
    def from_sae_lens(cls, sae: torch.nn.Module) -> "SparseAutoencoder":
        """The same autoencoder as one loaded or trained with SAELens; its weights are copied.

        Raises:
            ConfigError: not an SAE of SAELens, or an architecture or option that is not supported.
        """
        from sae_lens import SAE, TrainingSAE

        if not isinstance(sae, SAE):
            raise ConfigError(f"A {type(sae).__name__} was given; from_sae_lens takes an SAE of SAELens.")
        weights = {name: value.detach().clone() for name, value in sae.state_dict().items()}
        if isinstance(sae, TrainingSAE):
            sae.process_state_dict_for_saving_inference(weights)
            body = sae.cfg.get_inference_sae_cfg_dict()
        else:
            sae.process_state_dict_for_saving(weights)
            body = sae.cfg.to_dict()
        return cls(Configuration.parse(body), {name: value.to(sae.dtype) for name, value in weights.items()})

    @property
    def architecture(self) -> Architecture:
        """Which kind of encoder it has."""
        return self.configuration.architecture

    @property
    def d_in(self) -> int:
        """Width of the states."""
        return self.configuration.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.configuration.d_sae

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is on record about it: model, hook name, training."""
        return self.configuration.metadata

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, whatever the states come in."""
        return self.weights["W_dec"].dtype

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return self.weights["W_dec"].device

    @property
    def site(self) -> Site | None:
        """Where its states come from; None where its metadata do not say, or in words that have no one meaning."""
        name, head = self.metadata.get("hook_name"), self.metadata.get("hook_head_index")
        return site_of(name, head if isinstance(head, int) else None) if isinstance(name, str) else None

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of each latent adds to a state; to a normalised one, where states are normalised.

        Unlike the tensor W_dec it includes `rescale_acts_by_decoder_norm`.
        """
        rows = self.weights["W_dec"]
        return rows / rows.norm(dim=1, keepdim=True) if self.configuration.rescale_acts_by_decoder_norm else rows

    @cached_property
    def key(self) -> str:
        """A hash of configuration and weights."""
        return content_key([self.configuration, dict(self.weights)])

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*b d_sae"]:
        """Latent activations, in the autoencoder's own dtype.

        Args:
            x: states [..., d_in]; for `hook_z` autoencoders also by head, [..., n_heads, d_head].

        Raises:
            ShapeError: states of another width.
        """
        own, w = self.configuration, self.weights
        rows = self._flat(x)
        inner = (rows - self._centre(rows)) / self._divisor(rows)
        if own.apply_b_dec_to_input:
            inner = inner - w["b_dec"]
        if own.architecture == "gated":
            magnitude = inner @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
            return (inner @ w["W_enc"] + w["b_gate"] > 0) * magnitude.relu()
        before = inner @ w["W_enc"] + w["b_enc"]
        if own.architecture == "jumprelu":
            return before.relu() * (before > w["threshold"])
        if own.architecture == "topk" and own.k is not None:
            before = before * w["W_dec"].norm(dim=1) if own.rescale_acts_by_decoder_norm else before
            values, index = before.topk(own.k, dim=-1, sorted=False)
            return torch.zeros_like(before).scatter(-1, index, values.relu())
        return before.relu()

    def decode(self, f: Float[Tensor, "*b d_sae"], x: Float[Tensor, "..."] | None = None) -> Float[Tensor, "..."]:
        """States from latent activations, in the autoencoder's own dtype.

        Args:
            x: the states that were encoded. They give the norm and the mean that a normalising autoencoder gives back,
                and the form of the result where states come by head; else they do not matter.

        Raises:
            ConfigError: an autoencoder that normalises, without `x`.
            ShapeError: latents or states of another width.
        """
        if f.shape[-1] != self.d_sae:
            raise ShapeError(f"Latents of width {f.shape[-1]} were given to an autoencoder of {self._sizes}.")
        out = f @ self.decoder + self.weights["b_dec"]
        if x is None:
            if self.normalises:
                raise ConfigError(
                    f"This autoencoder has normalize_activations={self.configuration.normalize_activations!r}, so its "
                    "latents do not say how long the state was. Use decode(latents, x) with the states encoded."
                )
            return out
        rows = self._flat(x)
        return (out * self.gain(rows) + self._centre(rows)).reshape(x.shape)

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The reconstruction: `decode(encode(x), x)`, in the shape of `x`."""
        return self.decode(self.encode(x), x)

    @property
    def normalises(self) -> bool:
        """Whether the length of a state is taken off before it is encoded."""
        return self.configuration.normalize_activations in ("layer_norm", "constant_norm_rescale")

    def gain(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*b 1"]:
        """What a decoded state is multiplied by, one number a row: 1 unless states are normalised."""
        rows = self._flat(x)
        match self.configuration.normalize_activations:
            case "layer_norm":
                return (rows - self._centre(rows)).std(dim=-1, keepdim=True)
            case "constant_norm_rescale":
                return rows.norm(dim=-1, keepdim=True) / math.sqrt(self.d_in)
            case _:
                return rows.new_ones(()).expand(*rows.shape[:-1], 1)

    def require_site(self, site: Site) -> None:
        """Check that it was trained on states of this site. One that does not say where is taken at the user's word.

        Raises:
            SiteError: another site.
        """
        if self.site is not None and not same_state(self.site, site):
            raise SiteError(
                f"This sparse autoencoder was trained at {self.site.short} ({self.metadata['hook_name']}), but is used "
                f"at {site.short}. Use it there, or sae.moved(site) if that is what you mean."
            )

    def require_width(self, width: int) -> None:
        """Check that it fits states of this width.

        Raises:
            ShapeError: another width, with both.
        """
        if width != self.d_in:
            raise ShapeError(
                f"A sparse autoencoder with d_in={self.d_in} was used on states of width {width}. "
                "It was trained on another model or another kind of site."
            )

    def moved(self, site: Site) -> "SparseAutoencoder":
        """The same weights, said to live at another site."""
        named = {**self.metadata, "hook_name": str(site), "hook_head_index": site.head}
        return replace(self, configuration=replace(self.configuration, metadata=named))

    def folded(self, factor: float) -> "SparseAutoencoder":
        """The same autoencoder for states that are no longer multiplied by `factor` beforehand.

        For `normalize_activations="expected_average_only_in"`, where that is sqrt(d_in) over the mean norm of the
        states in training.
        """
        w = self.weights
        changed = {"W_enc": w["W_enc"] * factor, "W_dec": w["W_dec"] / factor, "b_dec": w["b_dec"] / factor}
        own = replace(self.configuration, normalize_activations="none")
        return SparseAutoencoder(own, {**w, **changed})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SparseAutoencoder":
        """On another device, or in another dtype."""
        return replace(self, weights={name: value.to(device, dtype) for name, value in self.weights.items()})

    def save(self, path: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` into a folder; SAELens reads them too.

        Raises:
            StoreError: the place cannot be written.
            ConfigError: metadata that are not plain JSON values.
        """
        write_folder(Path(path), self.configuration, self.weights)
        return Path(path)

    def __repr__(self) -> str:
        site = self.metadata.get("hook_name") if self.site is None else self.site.short
        return f"SparseAutoencoder({self.architecture}, {self._sizes}, site {site}, key {self.key[:12]})"

    @property
    def _sizes(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}"

    def _flat(self, x: Tensor) -> Tensor:
        """The states as [..., d_in] in the autoencoder's dtype."""
        by_head = self.configuration.reshape_activations == "hook_z" and x.ndim > 1 and x.shape[-1] != self.d_in
        rows = x.flatten(-2) if by_head else x
        self.require_width(rows.shape[-1] if rows.ndim else 0)
        return rows.to(self.dtype)

    def _centre(self, rows: Tensor) -> Tensor:
        """What is taken off each row before it is encoded; 0 except in layer normalisation."""
        layer_norm = self.configuration.normalize_activations == "layer_norm"
        return rows.mean(dim=-1, keepdim=True) if layer_norm else rows.new_zeros(())

    def _divisor(self, rows: Tensor) -> Tensor:
        gain = self.gain(rows)
        return gain + _EPS if self.configuration.normalize_activations == "layer_norm" else gain
