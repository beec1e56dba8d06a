"""What is checked when a model is loaded: that its layout's modules are where the streams are.

Streams are defined by the residual identities (see `core.sites`), so a layout that names a wrong module breaks one.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_probe.core.errors import BackendError
from subspace_probe.core.protocols import Model
from subspace_probe.core.sites import Site, Stream
from subspace_probe.core.tokens import TokenBatch
from subspace_probe.models.layouts import Layout

_STREAMS: tuple[Stream, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_ADVICE = "Its row in subspace_probe/models/layouts.py does not fit this version of transformers."


def require_modules(block: nn.Module, layout: Layout, family: str) -> None:
    """Check that a block has the modules its layout names.

    Raises:
        BackendError: with the ones that are missing.
    """
    present = {name for name, _ in block.named_modules()}
    named = (layout.attn, layout.mlp, layout.z, layout.resid_mid)  # mlp_post may be missing from single blocks
    if missing := [path for path in named if path and path not in present]:
        raise BackendError(f"The blocks of {family} have no {', '.join(missing)}. {_ADVICE}")


@torch.no_grad()
def check_identities(model: Model, blocks: Sequence[nn.Module], layout: Layout, device: torch.device) -> None:
    """The residual identities on four tokens, at the first and the last block; and that a pass can be continued.

    Raises:
        BackendError: an identity that fails, with the deviation.
    """
    spec, last = model.spec, model.spec.n_layers - 1
    ids = torch.tensor([[1, 2, 3, 4]], device=device) % spec.d_vocab
    ones = torch.ones_like(ids, dtype=torch.bool)
    nowhere = torch.full((1, 2), -1, device=device)
    batch = TokenBatch(ids, ones, nowhere, ~ones[:, 0], ("",), (((0, 0),) * 4,), torch.arange(1))
    layers = sorted({0, last})
    run = model.run(batch, reads=[Site(layer, stream) for layer in layers for stream in _STREAMS])
    for layer in layers:
        pre, attn, mlp, post = (run.reads[Site(layer, stream)] for stream in _STREAMS)
        if not attn.shape == mlp.shape == post.shape:
            shapes = ", ".join(str(tuple(x.shape[2:])) for x in (pre, attn, mlp, post))
            raise BackendError(f"{spec.family} has {', '.join(_STREAMS)} of unequal widths {shapes}. {_ADVICE}")
        block = blocks[layer]
        if layout.post_norm:
            norms = block.get_submodule("attention.output.LayerNorm"), block.get_submodule("output.LayerNorm")
            summed = norms[1](mlp + norms[0](attn + pre))
        else:
            summed = pre.float() + attn.float() + mlp.float()
        scale = max(float(x.abs().max()) for x in (pre, attn, mlp, post))
        _require_close(
            summed, post, scale, f"resid_pre + attn_out + mlp_out = resid_post at layer {layer}", spec.family
        )
    if run.logits is not None and not spec.encoder:
        continued = model.run(batch, prefix=model.prefix(batch, last)).logits
        assert continued is not None  # noqa: S101  (nothing stopped the pass)
        scale = float(run.logits.abs().max())
        _require_close(continued, run.logits, scale, "continuing from the last block gives the logits", spec.family)


def _require_close(
    found: Float[Tensor, "1 4 d"], wanted: Float[Tensor, "1 4 d"], scale: float, identity: str, family: str
) -> None:
    # half precision rounds each of the sums; relative to the scale, so that small activations hide nothing
    tolerance = scale * (1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2)
    error = float((found.float() - wanted.float()).abs().max())
    if not error <= tolerance:
        raise BackendError(
            f"{family} breaks the identity '{identity}' by {error:.3g} on activations of {scale:.3g}. {_ADVICE}"
        )
