"""Names of trained dictionaries as sites, in every scheme; unknown ones are not guessed at."""

import pytest


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("blocks.1.hook_resid_post", "L1.resid_post"),
        ("blocks.12.hook_resid_pre", "L12.resid_pre"),
        ("blocks.0.hook_resid_mid", "L0.resid_mid"),
        ("blocks.2.hook_mlp_out", "L2.mlp_out"),
        ("blocks.2.attn.hook_z", "L2.z"),
        ("blocks.2.mlp.hook_post", "L2.mlp_post"),
        ("blocks.1.hook_out", "L1.resid_post"),
        ("blocks.1.hook_in", "L1.resid_pre"),
        ("blocks.3.attn.o.hook_in", "L3.z"),
        ("model.layers.1", "L1.resid_post"),
        ("transformer.h.11", "L11.resid_post"),
        ("gpt_neox.layers.4", "L4.resid_post"),
        ("model.language_model.layers.7", "L7.resid_post"),
        ("blocks.3.ln1.hook_normalized", None),
        ("model.layers.3.mlp", None),  # not what is added, in families with a norm behind it
        ("model.layers.x", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_names(name: str, short: str | None) -> None:
    from subspace_probe.dictionaries import site_of

    site = site_of(name)
    assert (None if site is None else site.short) == short


def test_heads() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries import site_of

    assert site_of("blocks.2.attn.hook_z", 3) == Site(2, "z", 3)
    assert site_of("blocks.2.hook_resid_post", 3) is None


def test_the_end_of_a_block_is_the_start_of_the_next() -> None:
    from subspace_probe.core.sites import Site
    from subspace_probe.dictionaries import same_state

    assert same_state(Site(4), Site(5, "resid_pre"))
    assert not same_state(Site(4), Site(4, "resid_pre"))
    assert not same_state(Site(0), Site(0, "resid_pre"))
