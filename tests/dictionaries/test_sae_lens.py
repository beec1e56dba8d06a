"""Agreement with SAELens, which takes seconds to import: the same numbers, files both ways, and training with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dictionaries.small import small, states
from tests.planted import activations

pytestmark = pytest.mark.slow

OPTIONS: list[dict[str, Any]] = [
    {"apply_b_dec_to_input": b, "normalize_activations": n, "reshape_activations": r}
    for b in (True, False)
    for n in ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
    for r in ("none", "hook_z")
]
CASES = [(a, o) for a in ("standard", "jumprelu", "gated") for o in OPTIONS]
CASES += [("topk", o | {"rescale_acts_by_decoder_norm": r}) for o in OPTIONS for r in (True, False)]


@pytest.mark.parametrize(("architecture", "options"), CASES)
@pytest.mark.filterwarnings("ignore:The sparse autoencoder:UserWarning")
def test_encodes_and_decodes_as_sae_lens_does(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Our file read by SAELens, its file read by us, its object taken over: one set of numbers."""
    from sae_lens import SAE

    from subspace_probe.dictionaries import SparseAutoencoder, load_sae

    name = "blocks.1.attn.hook_z" if options["reshape_activations"] == "hook_z" else "blocks.1.hook_resid_post"
    ours = small(architecture, metadata={"hook_name": name, "note": [1, "a"]}, **options)
    theirs = SAE.load_from_disk(ours.save(tmp_path / "ours"))
    theirs.save_model(tmp_path / "theirs")
    x = states().reshape(8, 8, 3, 4) if options["reshape_activations"] == "hook_z" else states().reshape(8, 8, 12)
    with torch.no_grad():
        latents = theirs.encode(x)
        out = theirs.decode(latents)
    assert theirs.cfg.metadata.note == [1, "a"]
    assert float((latents == 0).float().mean()) > 0.1
    for sae in (ours, load_sae(tmp_path / "theirs"), SparseAutoencoder.from_sae_lens(theirs)):
        assert torch.allclose(sae.encode(x), latents, atol=1e-6, rtol=1e-6)
        assert torch.allclose(sae.decode(latents, x), out, atol=1e-6, rtol=1e-6)
        assert sae.site == ours.site
        assert sae.metadata["note"] == [1, "a"]
    plain = small(architecture, **{k: v for k, v in options.items() if k == "normalize_activations"})
    if not options["apply_b_dec_to_input"]:  # control: the option matters
        assert not torch.allclose(plain.encode(states()), latents.reshape(64, -1), atol=1e-3)


def test_what_is_not_an_sae() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.dictionaries import SparseAutoencoder

    with pytest.raises(ConfigError, match="Linear was given"):
        SparseAutoencoder.from_sae_lens(torch.nn.Linear(2, 2))


def test_an_unknown_release_is_an_error() -> None:
    from subspace_probe.core.errors import StoreError
    from subspace_probe.dictionaries import load_sae

    with pytest.raises(StoreError, match="cannot load 'x' of the release 'no-such-release'"):
        load_sae("no-such-release", "x")


def test_files_from_before_version_six(tmp_path: Path) -> None:
    """Everything on one level, top-k by its activation function: as SAELens reads it."""
    import json

    from sae_lens import SAE

    from subspace_probe.dictionaries import load_sae

    small("topk").save(tmp_path)
    old = {"d_in": 12, "d_sae": 20, "dtype": "torch.float32", "hook_point": "blocks.1.hook_resid_post"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False}
    old |= {"apply_b_dec_to_input": False, "model_name": "old"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(tmp_path)
    assert torch.allclose(ours.encode(states()), theirs.encode(states()), atol=1e-6)
    assert (ours.architecture, ours.configuration.k, ours.metadata["model_name"]) == ("topk", 3, "old")
    assert ours.site is not None
    assert ours.site.short == "L1.resid_post"


# ------------------------------------------------------------------------------------------------------------ training
def _sparse_rows(n: int = 10_000, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of a few of 64 directions in 32 dimensions."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, 32, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    active = torch.rand(n, 64, generator=draw) < 3 / 64
    return (active * torch.rand(n, 64, generator=draw).add(0.5)) @ directions + 0.2, directions


def _acts(x: torch.Tensor):
    from dataclasses import replace

    acts = activations(x, torch.arange(len(x)) % 2)
    return replace(acts, notes={"model": "none", "fingerprint": "f", "data": "planted", "data_hash": "h"})


def _train(acts: Any, **settings: Any):
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries import Training, train_sae

    common: dict[str, Any] = {"d_sae": 128, "k": 4, "steps": 300, "batch_size": 512, "lr": 3e-3}
    return train_sae(acts, Site(0), Training(**(common | settings)))


@pytest.mark.parametrize(
    ("architecture", "penalty"),
    [("topk", 0.0), ("batchtopk", 0.0), ("jumprelu", 0.1), ("standard", 0.5), ("gated", 0.5)],
)
def test_training_explains_sparse_rows(architecture: str, penalty: float, tmp_path: Path) -> None:
    from sae_lens import SAE

    from subspace_probe.core.sites import Site

    x, directions = _sparse_rows()
    before = torch.get_rng_state()
    sae = _train(_acts(x), architecture=architecture, penalty=penalty)
    assert torch.equal(torch.get_rng_state(), before)
    fresh = _sparse_rows(4000, seed=0)[0]
    naive = 1 - float((fresh - sae(fresh)).square().sum() / (fresh - fresh.mean(0)).square().sum())
    assert naive > 0.8
    assert sae.metadata["explained_variance"] == pytest.approx(naive, abs=0.03)
    assert 1 < sae.metadata["l0"] < 40
    assert sae.metadata["held_out_rows"] == 1000
    assert sae.metadata["rows"] == 9000
    assert (sae.site, sae.metadata["fingerprint"]) == (Site(0), "f")
    assert sae.metadata["training"]["architecture"] == architecture
    theirs = SAE.load_from_disk(sae.save(tmp_path))
    assert torch.allclose(theirs.encode(fresh), sae.encode(fresh), atol=1e-6)
    if architecture == "topk":
        rows = sae.decoder / sae.decoder.norm(dim=1, keepdim=True)
        assert float((directions @ rows.T).abs().amax(1).median()) > 0.9


def test_training_can_fail() -> None:
    """Control: after two steps nothing is explained."""
    assert _train(_acts(_sparse_rows()[0]), steps=2).metadata["explained_variance"] < 0.5


def test_a_frozen_decoder_keeps_its_rows_and_the_rest_learns() -> None:
    acts = _acts(_sparse_rows(4000)[0])

    def turned(frozen: bool) -> tuple[float, float]:
        """Least cosine between rows after one step and after many: of the decoder, and of the encoder."""
        ends = [_train(acts, steps=steps, frozen_decoder=frozen) for steps in (1, 60)]
        pairs = ([sae.decoder for sae in ends], [sae.weights["W_enc"].T for sae in ends])
        decoder, encoder = (float(torch.cosine_similarity(*rows, dim=1).min()) for rows in pairs)
        return decoder, encoder

    decoder, encoder = turned(True)
    assert decoder > 1 - 1e-5
    assert encoder < 0.9
    assert turned(False)[0] < 0.9  # control


def test_the_seed_decides_and_disk_does_not_matter(tmp_path: Path) -> None:
    import sys

    from subspace_probe.store import open_activations, save_activations

    acts = _acts(_sparse_rows(3000)[0])
    disk = open_activations(save_activations(acts, tmp_path))
    first, again, stored = (_train(a, steps=10, buffer_rows=1024) for a in (acts, acts, disk))
    assert first.key == again.key == stored.key
    assert _train(acts, steps=10, buffer_rows=1024, seed=1).key != first.key
    wandb: Any = sys.modules.get("wandb")
    assert wandb is None or wandb.run is None


def test_training_says_what_is_wrong() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries import Training, train_sae

    acts = _acts(_sparse_rows(300)[0])
    with pytest.raises(DataError, match="270 rows to train on"):
        _train(acts)
    with pytest.raises(SiteError, match="Capture it first"):
        train_sae(acts, Site(3), Training(batch_size=8))
    for wrong in ({"steps": 0}, {"k": 5000}, {"lr": 0.0}, {"penalty": -1.0}, {"held_out": 2.0}):
        with pytest.raises(ConfigError):
            train_sae(acts, Site(0), Training(**({"batch_size": 8} | wrong)))
