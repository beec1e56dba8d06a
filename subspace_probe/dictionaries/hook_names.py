"""From the names that trained dictionaries carry to sites: three naming schemes, one meaning.

Only names that mean the same tensor in every family are read. `model.layers.3.mlp`, for instance, is what is added to
the stream in Llama and is not in families with a norm behind their MLP, so it has no site until the user gives one.
"""

import re

from subspace_probe.core.errors import SubspaceProbeError
from subspace_probe.core.sites import Site, Stream

_BRIDGE: dict[str, Stream] = {
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "attn.o.hook_in": "z",
    "mlp.out.hook_in": "mlp_post",
}
"""Names of the TransformerLens bridge below `blocks.<layer>.`, where they differ from the older ones."""

_BRIDGE_NAME = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_MODULE_NAME = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:layers|layer|h|blocks|block)\.(?P<layer>\d+)")


def site_of(hook_name: str, head: int | None = None) -> Site | None:
    """The site that a hook name means; None where it is not known.

    Args:
        hook_name: of TransformerLens (`blocks.1.hook_resid_post`), of its bridge (`blocks.1.hook_out`), or the path of
            a Hugging Face block (`model.layers.1`, `transformer.h.1`), whose output is meant.
        head: the head, for dictionaries of one head's `z`.

    >>> site_of("blocks.1.hook_out"), site_of("transformer.h.1"), site_of("blocks.1.ln2.hook_normalized")
    (Site(layer=1, stream='resid_post', head=None), Site(layer=1, stream='resid_post', head=None), None)
    """
    if match := _MODULE_NAME.fullmatch(hook_name):
        return Site(int(match["layer"]))
    if (match := _BRIDGE_NAME.fullmatch(hook_name)) and match["rest"] in _BRIDGE:
        site = Site(int(match["layer"]), _BRIDGE[match["rest"]])
    else:
        try:
            site = Site.parse(hook_name)
        except SubspaceProbeError:  # a hook inside a block that is no site, or a scheme of its own
            return None
    if head is None or site.head is not None:
        return site
    return Site(site.layer, site.stream, head) if site.stream == "z" else None


def same_state(a: Site, b: Site) -> bool:
    """Whether two sites are one tensor: equal, or the end of one block and the start of the next.

    >>> same_state(Site(4, "resid_post"), Site(5, "resid_pre"))
    True
    """
    return _boundary(a) == _boundary(b)


def _boundary(site: Site) -> Site:
    return Site(site.layer - 1) if site.stream == "resid_pre" and site.layer > 0 else site
