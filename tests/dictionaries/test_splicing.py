"""A spliced autoencoder in the forward pass of the organism."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.dictionaries.small import small

if TYPE_CHECKING:
    from subspace_probe.models.hooked import HookedModel

TEXTS = ["please open the door", "the child is in the garden today"]


def _sae(chat: "HookedModel", architecture: str = "standard", **options: object):
    return small(architecture, chat.spec.d_model, 300, **options)


def _ablate(latent: int):
    def change(f: torch.Tensor) -> torch.Tensor:
        f = f.clone()
        f[:, latent] = 0
        return f

    return change


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_without_a_change_the_error_term_gives_the_model_back(
    chat: "HookedModel", architecture: str, normalize: str
) -> None:
    from subspace_probe.dictionaries import splice

    sae, batch = _sae(chat, architecture, normalize_activations=normalize), chat.tokens(TEXTS)
    clean = chat.run(batch).logits
    kept = chat.run(batch, writes=splice(sae).at(chat.backend)).logits
    bare = chat.run(batch, writes=splice(sae, error=False).at(chat.backend)).logits
    assert float((kept - clean).abs().max()) <= 1e-5 * float(clean.abs().max())
    assert float((bare - clean).abs().max()) > 0.1 * float(
        clean.abs().max()
    )  # control: random weights reconstruct nothing


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale"])
def test_ablating_a_latent_takes_off_its_row_and_no_more(chat: "HookedModel", normalize: str) -> None:
    from subspace_probe.dictionaries import splice

    sae, batch = _sae(chat, normalize_activations=normalize), chat.tokens(TEXTS)
    site = sae.site
    x = chat.run(batch, reads=[site]).reads[site].double()
    own = sae.to(dtype=torch.float64)
    f, latent = own.encode(x), int(own.encode(x).sum((0, 1)).argmax())
    y = chat.run(batch, reads=[site], writes=splice(sae, _ablate(latent)).at(chat.backend)).reads[site]
    length = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 if normalize != "none" else 1.0
    wanted = -f[..., latent, None] * length * own.weights["W_dec"][latent]
    real = torch.arange(x.shape[1]) >= (x.shape[1] - batch.lengths)[:, None]  # padded on the left
    assert torch.allclose((y - x)[real], wanted[real], atol=2e-6)
    assert float(wanted[real].abs().max()) > 0.01


def test_with_and_without_the_error_differ_by_the_error(chat: "HookedModel") -> None:
    """The definition, computed plainly: decode(change(f)), plus x - decode(f)."""
    from subspace_probe.core.tokens import LAST
    from subspace_probe.dictionaries import splice

    sae, batch = _sae(chat, "topk"), chat.tokens(TEXTS)
    site, change = sae.site, lambda f: 3 * f.roll(1, dims=1)
    x = chat.run(batch, reads=[site]).reads[site]
    got = {
        error: chat.run(batch, reads=[site], writes={site: splice(sae, change, where=LAST, error=error)}).reads[site]
        for error in (True, False)
    }
    last = x[:, -1]
    f = sae.encode(last)
    assert torch.allclose(got[False][:, -1], sae.decode(change(f)), atol=1e-5)
    assert torch.allclose(got[True][:, -1], sae.decode(change(f)) + last - sae.decode(f), atol=1e-5)
    assert torch.equal(got[True][:, :-1], x[:, :-1])  # other tokens are not touched


def test_gradients_flow(chat: "HookedModel") -> None:
    """Through the change into a parameter, against a finite difference."""
    from subspace_probe.dictionaries import splice

    sae, batch = _sae(chat), chat.tokens(TEXTS[:1])

    def total(strength: torch.Tensor, grad: bool) -> torch.Tensor:
        edits = splice(sae, lambda f: f * strength).at(chat.backend)
        return chat.run(batch, writes=edits, grad=grad).logits[:, -1].log_softmax(-1)[0, 5]

    strength = torch.tensor(1.3, requires_grad=True)
    total(strength, True).backward()
    step = 1e-2
    near = [float(total(torch.tensor(1.3 + sign * step), False)) for sign in (1, -1)]
    numeric = (near[0] - near[1]) / (2 * step)
    assert abs(numeric) > 1e-2
    assert float(strength.grad) == pytest.approx(numeric, rel=2e-2)


def test_what_does_not_fit_is_said_before_anything_runs(chat: "HookedModel") -> None:
    from subspace_probe.core.errors import ShapeError, SiteError
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries import splice

    narrow, batch = small(), chat.tokens(TEXTS)
    asked: list[int] = []

    def change(f: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return f

    width = rf"d_in=12 was used on states of width {chat.spec.d_model}"
    with pytest.raises(ShapeError, match=width):
        splice(narrow, change).at(chat.backend)
    with pytest.raises(ShapeError, match=width):
        chat.run(batch, writes={Site(1): splice(narrow, change)})
    assert not asked
    sae = _sae(chat)
    with pytest.raises(SiteError, match=r"trained at L1\.resid_post"):
        splice(sae).at(chat.backend, Site(2))
    with pytest.raises(SiteError, match="model has 4 layers"):
        splice(sae.moved(Site(9))).at(chat.backend)
    with pytest.raises(SiteError, match="does not say where"):
        splice(_sae(chat, metadata={})).at(chat.backend)
    assert list(splice(_sae(chat, metadata={})).at(chat.backend, Site(-1))) == [Site(3)]
    with pytest.raises(ShapeError, match="must keep the shape"):
        chat.run(batch, writes=splice(sae, lambda f: f[:, :2]).at(chat.backend))
