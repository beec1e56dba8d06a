"""A sparse autoencoder from a folder, or by name from the releases that SAELens knows."""

import math
import warnings
from pathlib import Path

import torch

from subspace_probe.core.errors import StoreError
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.folders import read_folder


def load_sae(
    path: str | Path,
    sae_id: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseAutoencoder:
    """Load a sparse autoencoder.

    Args:
        path: a folder with `cfg.json` and `sae_weights.safetensors`, read without SAELens; or, with `sae_id`, a
            release that SAELens knows or a repository of the hub, which is downloaded.
        sae_id: which autoencoder of the release.
        device: default is the CPU.
        dtype: default is the one the configuration names.

    Raises:
        StoreError: no such folder or release, a file that is missing or damaged, tensors missing or of wrong shape.
        ConfigError: an architecture or option that is not supported, with the key.
    """
    folder = Path(path)
    if sae_id is not None:
        sae = _released(str(path), sae_id).to(device, dtype)
    elif not folder.is_dir():
        raise StoreError(
            f"No folder {str(path)!r}. Give one with cfg.json and sae_weights.safetensors, or a release of SAELens "
            "with the name of the autoencoder: load_sae(release, sae_id)."
        )
    else:
        configuration, tensors, stated = read_folder(folder)
        kept = {name: value.to(device, dtype or stated) for name, value in tensors.items()}
        try:
            sae = SparseAutoencoder(configuration, kept)
        except StoreError as error:
            raise StoreError(f"Cannot read {str(path)!r}: {error}") from None
    if sae.configuration.normalize_activations == "expected_average_only_in":
        warnings.warn(
            f"The sparse autoencoder {str(path)!r} expects states scaled to a mean norm of sqrt(d_in) = "
            f"{math.sqrt(sae.d_in):.4g}, and does not know the factor. Use sae.folded(sqrt(d_in) / mean_norm).",
            stacklevel=2,
        )
    return sae


def _released(release: str, sae_id: str) -> SparseAutoencoder:
    from sae_lens import SAE

    try:
        return SparseAutoencoder.from_sae_lens(SAE.from_pretrained(release, sae_id))
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise StoreError(
            f"SAELens cannot load {sae_id!r} of the release {release!r}: {first} Check both names in its table of "
            "pretrained autoencoders, and the network; or give the path of a folder that was downloaded."
        ) from None
