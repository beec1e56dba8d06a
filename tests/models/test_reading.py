"""Which matrices write to a site and read it: what each is said to do to a small change, against the change itself.

Differences are central ones: RMS norms compute in float32 whatever the model's dtype, so steps cannot be tiny.
"""

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import VARIANTS, text, tiny, words

if TYPE_CHECKING:
    from subspace_probe.models.backend import Backend
    from subspace_probe.models.reading import Matrix

STEP = 1e-2
FUSED = ("mixtral", "qwen3_moe")


def copied(variant: str) -> "Backend":
    from subspace_probe.models import load_model

    return load_model(copy.deepcopy(tiny(variant)), tokenizer=words()).backend


def outputs(backend: "Backend", names: list[str], site: str, change: Tensor) -> dict[str, Tensor]:
    """What the named matrices give for the last token, with a change added to a site."""
    from subspace_probe.core.edits import At
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.models.chat import encode

    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[name] = output.detach().reshape(-1, output.shape[-1])[-1].clone()

        return hook

    modules = dict(backend.hf.named_modules())
    handles = [modules[name.removesuffix(".weight")].register_forward_hook(keep(name)) for name in names]
    batch = encode(words(), [Prompt(text=text(5, 3))])
    writes = {Site.parse(site): At(LAST, lambda x, rows: x + change.to(x))}
    backend.run(batch, writes=writes)
    for handle in handles:
        handle.remove()
    return found


def state(backend: "Backend", site: str) -> Tensor:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.models.chat import encode

    batch = encode(words(), [Prompt(text=text(5, 3))])
    return next(iter(backend.run(batch, reads=[Site.parse(site)], where=LAST).reads.values()))[0].double()


def vectors(matrix: "Matrix") -> Tensor:
    return torch.cat(list(matrix.vectors()))


def along(d: int, *away: Tensor) -> Tensor:
    """A random direction that no norm's own scale or mean changes with: orthogonal to the state, and to constants."""
    drawn = torch.randn(d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    frame = torch.linalg.qr(torch.stack([torch.ones(d, dtype=torch.float64), *away]).T)[0]
    return drawn - frame @ (frame.T @ drawn)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in FUSED])
@pytest.mark.parametrize("site", ["L1.resid_pre", "L1.resid_mid", "L2.resid_post", "L1.z.h1", "L1.mlp_post"])
def test_what_a_reader_makes_of_a_change_is_its_vectors_times_the_change(variant: str, site: str) -> None:
    from subspace_probe.core.errors import UnsupportedSite
    from subspace_probe.core.sites import Site
    from subspace_probe.models.reading import readers

    backend = copied(variant)
    try:
        found = readers(backend, Site.parse(site))
    except UnsupportedSite:
        parallel = "resid_mid" in backend.spec.unsupported and site == "L1.resid_mid"
        assert parallel or (variant == "bert" and site == "L2.resid_post")
        return
    x = state(backend, site)
    change = along(len(x), x)
    names = [matrix.name for matrix in found]
    after, before = (outputs(backend, names, site, step * change) for step in (STEP, -STEP))
    direct = [m for m in found if site != "L1.resid_pre" or "resid_mid" in backend.spec.unsupported or _attends(m.name)]
    assert direct
    for matrix in direct:  # the MLP of a sequential block also sees what attention makes of the change
        effect = (after[matrix.name] - before[matrix.name]).double() / (2 * STEP)
        said = vectors(matrix) @ change
        scale = (effect @ said) / (said @ said)  # what the norm divides by, one number
        assert float(scale) > 0.01
        assert float((effect - scale * said).norm()) < 2e-3 * float(effect.norm()), matrix.name
        if matrix.gain is not None:  # control: without the gain
            bare = matrix.weight.double() @ change
            factor = (effect @ bare) / (bare @ bare)
            assert float((effect - factor * bare).norm()) > 2e-2 * float(effect.norm())


def _attends(name: str) -> bool:
    return any(part in name for part in ("attn", "attention"))


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize(("site", "through"), [("L1.attn_out", "L1.z"), ("L1.mlp_out", "L1.mlp_post")])
def test_what_a_writer_makes_of_its_input_is_a_sum_of_its_vectors(variant: str, site: str, through: str) -> None:
    from subspace_probe.core.edits import At
    from subspace_probe.core.errors import UnsupportedSite
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import LAST
    from subspace_probe.models.chat import encode
    from subspace_probe.models.reading import writers

    backend = copied(variant)
    if variant in FUSED and site == "L1.mlp_out":
        with pytest.raises(UnsupportedSite, match="fused"):
            writers(backend, Site.parse(site))
        return
    (matrix,) = writers(backend, Site.parse(site))
    batch = encode(words(), [Prompt(text=text(5, 3))])
    place, source = Site.parse(site), Site.parse(through)
    written = state(backend, site)
    rows = vectors(matrix)
    change = torch.randn(len(rows), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if matrix.gain is not None:  # a change that what the norm divides by does not see
        bare = matrix.weight.double() @ (written / matrix.gain)
        change = change - bare * (change @ bare) / (bare @ bare)
    moved: list[Tensor] = []
    for step in (STEP, -STEP):
        edit = {source: At(LAST, lambda x, rows: x + (step * change).to(x))}  # noqa: B023  (used in this turn only)
        moved += list(backend.run(batch, reads=[place], writes=edit, where=LAST).reads.values())
    effect, said = (moved[0] - moved[1])[0].double() / (2 * STEP), change @ rows
    scale = (effect @ said) / (said @ said)
    assert float((effect - scale * said).norm()) < 2e-3 * float(effect.norm())
    assert matrix.gain is not None or float(scale) == pytest.approx(1.0, abs=1e-3)


def test_sites_of_one_stream_have_the_same_readers_and_writers() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.models.reading import readers, writers

    backend = copied("llama")
    for find in (readers, writers):
        post, pre = (find(backend, site) for site in (Site(0), Site(1, "resid_pre")))
        assert [m.name for m in post] == [m.name for m in pre]
    mid = [m.name.split(".")[-2] for m in readers(backend, Site(1, "attn_out"))]
    assert mid == ["gate_proj", "up_proj"]
    assert [m.name for m in readers(backend, Site(-1))] == ["lm_head.weight"]


def test_what_has_no_matrix_is_refused_with_the_reason() -> None:
    from subspace_probe.core.errors import BackendError, UnsupportedSite
    from subspace_probe.core.sites import Site
    from subspace_probe.models.reading import readers, writers

    backend = copied("llama")
    with pytest.raises(UnsupportedSite, match="nonlinearity"):
        writers(backend, Site(1, "mlp_post"))
    with pytest.raises(UnsupportedSite, match="embeddings"):
        writers(backend, Site(0, "resid_pre"))
    with pytest.raises(UnsupportedSite, match="fused"):
        readers(copied("mixtral"), Site(0))
    with pytest.raises(UnsupportedSite, match="normed"):
        writers(copied("bert"), Site(0))
    with pytest.raises(UnsupportedSite, match="no unembedding"):
        readers(copied("bert"), Site(-1))
    backend.blocks[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BackendError, match=r"layers\.1\.self_attn\.o_proj\.weight is int8"):
        writers(backend, Site(1, "attn_out"))
    assert writers(backend, Site(0, "attn_out"))  # control: the block below is whole
    backend.hf.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(BackendError, match="quantised"):
        writers(backend, Site(0, "attn_out"))


def test_adapters_that_are_not_merged_are_refused() -> None:
    from subspace_probe.core.errors import BackendError
    from subspace_probe.core.sites import Site
    from subspace_probe.models.reading import writers

    backend = copied("llama")

    class Wrapped(nn.Linear):
        """As PEFT wraps a matrix: the base layer inside, adapters beside it."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__(1, 1)
            self.base_layer = base

    assert writers(backend, Site(1, "attn_out"))
    backend.blocks[1].self_attn.o_proj = Wrapped(backend.blocks[1].self_attn.o_proj)
    with pytest.raises(BackendError, match="merge_and_unload"):
        writers(backend, Site(1, "attn_out"))
