"""Names of sites, their order, and what a user may write for several of them."""

import pytest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.12.hook_resid_post", (12, "resid_post", None)),
        ("blocks.0.hook_resid_pre", (0, "resid_pre", None)),
        ("blocks.3.attn.hook_z", (3, "z", None)),
        ("blocks.3.mlp.hook_post", (3, "mlp_post", None)),
        ("blocks.-1.hook_mlp_out", (-1, "mlp_out", None)),
        ("L12.resid_post", (12, "resid_post", None)),
        ("L-2.attn_out", (-2, "attn_out", None)),
        ("L12.z.h3", (12, "z", 3)),
    ],
)
def test_names_are_read(name: str, expected: tuple[int, str, int | None]) -> None:
    from subspace_probe.core.sites import Site

    assert Site.parse(name) == Site(*expected)


def test_names_survive_a_round_trip() -> None:
    from subspace_probe.core.sites import FORWARD_ORDER, Site

    for stream in FORWARD_ORDER:
        site = Site(7, stream)
        assert Site.parse(str(site)) == Site.parse(site.short) == site
    head = Site(7, "z", 3)
    assert Site.parse(head.short) == head


def test_bad_names_say_what_is_known() -> None:
    from subspace_probe.core.errors import SiteError, UnknownName
    from subspace_probe.core.sites import Site, stream

    with pytest.raises(UnknownName, match=r"stream 'resid_pots'\. Did you mean 'resid_post'\? Known: attn_out,"):
        Site.parse("L3.resid_pots")
    with pytest.raises(UnknownName, match="Did you mean 'mlp_out'"):
        stream("mlp_ouut")
    for name in ("layer 3", "3", "L3", "blocks.x.hook_resid_post", ""):
        with pytest.raises(SiteError, match=r"Cannot read the site .* Write 'L12.resid_post'"):
            Site.parse(name)
    with pytest.raises(SiteError, match="only 'z' and 'pattern' have heads"):
        Site(3, "resid_post", 1)


def test_layers_count_from_either_end() -> None:
    from subspace_probe.core.errors import SiteError
    from subspace_probe.core.sites import Site

    assert Site(-1).resolve(4) == Site(3)
    assert Site(0).resolve(4) == Site(0)
    assert Site(-1, "z", 2).resolve(4) == Site(3, "z", 2)
    for layer in (4, -5):
        with pytest.raises(SiteError, match=f"Layer {layer} was asked for, but the model has 4 layers. Use 0 to 3"):
            Site(layer).resolve(4)


def test_the_order_is_the_forward_passes() -> None:
    from subspace_probe.core.sites import FORWARD_ORDER, Site

    sites = [Site(layer, stream) for layer in range(2) for stream in FORWARD_ORDER]
    assert sorted(reversed(sites), key=lambda site: site.order) == sites
    assert FORWARD_ORDER[0] == "resid_pre"
    assert FORWARD_ORDER[-1] == "resid_post"


def test_what_a_user_writes_becomes_sites_in_forward_order() -> None:
    from subspace_probe.core.errors import SiteError, UnknownName
    from subspace_probe.core.sites import Site, resid_post, resid_pre, resolve_sites

    everywhere = tuple(Site(layer) for layer in range(3))
    assert resolve_sites("resid_post", 3) == resolve_sites(resid_post(), 3) == everywhere
    assert resolve_sites(resid_post(2, -3), 3) == (Site(0), Site(2))
    assert resolve_sites(resid_pre(1), 3) == (Site(1, "resid_pre"),)
    assert resolve_sites("L-1.z", 3) == (Site(2, "z"),)
    assert resolve_sites([Site(2), Site(0, "z"), Site(-1)], 3) == (Site(0, "z"), Site(2))
    with pytest.raises(SiteError, match="No sites were given"):
        resolve_sites([], 3)
    with pytest.raises(SiteError, match="3 layers"):
        resolve_sites(resid_post(3), 3)
    with pytest.raises(UnknownName, match="Did you mean 'resid_post'"):
        resolve_sites("residpost", 3)
