"""Reading, checking and computing, without SAELens; agreement with it is in test_sae_lens.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dictionaries.small import small, states

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_gives_back_what_was_saved(architecture: str, tmp_path: Path) -> None:
    from subspace_probe.dictionaries import load_sae

    sae = small(architecture)
    back = load_sae(sae.save(tmp_path / "sae"))
    x = states()
    assert torch.equal(back.encode(x), sae.encode(x))
    assert torch.equal(back(x), sae(x))
    assert back.configuration.metadata.items() >= sae.metadata.items()
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert load_sae(tmp_path / "sae", dtype=torch.float64)(x).dtype == torch.float64


def test_one_row_by_hand() -> None:
    """Every number of a two-by-two JumpReLU autoencoder, worked out on paper."""
    from subspace_probe.dictionaries import Configuration, SparseAutoencoder

    weights = {
        "W_enc": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        "b_enc": torch.tensor([0.5, -1.0]),
        "threshold": torch.tensor([2.0, 0.5]),
        "W_dec": torch.tensor([[1.0, 1.0], [0.0, 3.0]]),
        "b_dec": torch.tensor([1.0, -1.0]),
    }
    sae = SparseAutoencoder(Configuration("jumprelu", 2, 2), weights)
    x = torch.tensor([2.0, 0.0])  # less b_dec: [1, 1]; before the threshold: [1.5, 1]
    assert sae.encode(x).tolist() == [0.0, 1.0]
    assert sae(x).tolist() == [1.0, 2.0]


def test_the_decoder_is_what_one_unit_adds() -> None:
    for scaled in (False, True):
        sae = small("topk", rescale_acts_by_decoder_norm=scaled)
        unit = torch.eye(sae.d_sae)
        assert torch.allclose(sae.decode(unit) - sae.decode(torch.zeros_like(unit)), sae.decoder, atol=1e-6)
        assert bool(torch.allclose(sae.decoder.norm(dim=1), torch.ones(sae.d_sae))) == scaled


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_normalising_needs_the_states(normalize: str) -> None:
    """A state twice as long has the same latents and twice the reconstruction; without it there is no length."""
    from subspace_probe.core.errors import ConfigError

    sae, x = small(normalize_activations=normalize), states() * 50
    assert torch.allclose(sae.encode(2 * x), sae.encode(x), atol=1e-4)
    assert torch.allclose(sae(2 * x), 2 * sae(x), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(small().encode(2 * x), small().encode(x), atol=1e-1)  # control
    with pytest.raises(ConfigError, match="decode\\(latents, x\\)"):
        sae.decode(sae.encode(x))


def test_states_by_head() -> None:
    sae, x = small(reshape_activations="hook_z"), states()
    by_head = x.reshape(8, 8, 3, 4)
    assert torch.equal(sae.encode(by_head).flatten(0, 1), sae.encode(x))
    assert sae(by_head).shape == by_head.shape
    assert torch.equal(sae(by_head).reshape(64, 12), sae(x))


def test_folding_undoes_a_scale() -> None:
    for architecture in ARCHITECTURES:
        sae, x = small(architecture), states()
        folded = sae.folded(0.25)
        assert torch.allclose(folded.encode(x), sae.encode(x * 0.25), atol=1e-5)
        assert torch.allclose(folded(x), sae(x * 0.25) / 0.25, atol=1e-5)
        assert not torch.allclose(sae(x), sae(x * 0.25) / 0.25, atol=1e-2)  # control


def test_another_width_names_both() -> None:
    from subspace_probe.core.errors import ShapeError

    with pytest.raises(ShapeError, match="d_in=12 was used on states of width 11"):
        small().encode(torch.zeros(3, 11))
    with pytest.raises(ShapeError, match="Latents of width 19"):
        small().decode(torch.zeros(3, 19))


def test_sites_and_moving() -> None:
    from subspace_probe.core.errors import SiteError
    from subspace_probe.core.sites import Site

    sae = small()
    sae.require_site(Site(1))
    sae.require_site(Site(2, "resid_pre"))
    with pytest.raises(SiteError, match=r"trained at L1\.resid_post .* used at L2\.resid_post"):
        sae.require_site(Site(2))
    assert sae.moved(Site(0, "z", 1)).site == Site(0, "z", 1)
    nowhere = small(metadata={"hook_name": "somewhere"})
    assert nowhere.site is None
    nowhere.require_site(Site(2))


def test_keys_tell_contents() -> None:
    assert small().key == small().key
    assert len({small().key, small(seed=1).key, small(apply_b_dec_to_input=False).key, small("topk").key}) == 4


def _spoil(folder: Path, **changes: object) -> None:
    body = json.loads((folder / "cfg.json").read_text())
    body |= changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in body.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture='temporal'.* not supported"),
        ({"architecture": "batchtopk"}, "training checkpoint"),
        ({"normalize_activations": "covariance_whitening"}, "whitening matrix is not in the file"),
        ({"normalize_activations": "other"}, "normalize_activations='other'"),
        ({"reshape_activations": "heads"}, "reshape_activations='heads'"),
        ({"k": 21}, "k=21, but only d_sae=20"),
        ({"k": None}, "k=None"),
        ({"d_in": None}, "lacks the key 'd_in'"),
        ({"d_in": "12"}, "d_in='12'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input=1"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.dictionaries import load_sae

    small("topk").save(tmp_path)
    _spoil(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_sae(tmp_path)


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.dictionaries import load_sae

    with pytest.raises(StoreError, match=r"No folder .*load_sae\(release, sae_id\)"):
        load_sae(tmp_path / "none")
    with pytest.raises(StoreError, match=r"No file .*cfg\.json"):
        load_sae(tmp_path)
    small("jumprelu").save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors, sound = load_file(weights), weights.read_bytes()
    for change, message in (
        ({"threshold": None}, "lacks the tensors threshold"),
        ({"b_mag": torch.zeros(20)}, "does not know: b_mag"),
        ({"W_enc": torch.zeros(20, 12)}, r"W_enc has shape \(20, 12\).*must be \(12, 20\)"),
        ({"b_dec": torch.full((12,), float("nan"))}, "b_dec holds non-finite"),
        ({"scaling_factor": torch.full((20,), 2.0)}, "scaling_factor"),
    ):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, weights)
        with pytest.raises(StoreError, match=message):
            load_sae(tmp_path)
    save_file({**tensors, "scaling_factor": torch.ones(20)}, weights)  # a fine-tuned scale that does nothing
    load_sae(tmp_path)
    weights.write_bytes(sound[:-100])
    with pytest.raises(StoreError, match="not a readable safetensors"):
        load_sae(tmp_path)
    weights.unlink()
    with pytest.raises(StoreError, match=r"No file .*sae_weights"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(StoreError, match="not a readable JSON"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(StoreError, match="list, not an object"):
        load_sae(tmp_path)


def test_states_that_must_be_scaled_are_said_to_be(tmp_path: Path) -> None:
    from subspace_probe.dictionaries import load_sae

    small(normalize_activations="expected_average_only_in").save(tmp_path)
    with pytest.warns(UserWarning, match="folded"):
        load_sae(tmp_path)


@pytest.mark.slow
def test_reading_imports_neither_sae_lens_nor_pickle(tmp_path: Path) -> None:
    import subprocess
    import sys

    small().save(tmp_path)
    code = (
        "import sys; from subspace_probe.dictionaries import load_sae, splice; "
        f"splice(load_sae({str(tmp_path)!r})); print('sae_lens' in sys.modules, 'transformer_lens' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_metadata_that_are_no_json(tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError

    with pytest.raises(ConfigError, match="metadata"):
        small(metadata={"x": torch.zeros(1)}).save(tmp_path)
