"""Interventions survive JSON, bit by bit, and nothing else comes out of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from subspace_probe.core.protocols import Intervention

PROMPTS = ["please sweep the floor", "can you fold the paper today ?"]


def made() -> "list[Intervention]":
    from subspace_probe.core.sites import Site
    from subspace_probe.core.subspaces import Subspace
    from subspace_probe.core.tokens import ALL, LAST, after, at
    from subspace_probe.interventions.ablate import Ablate
    from subspace_probe.interventions.patch import Patch
    from subspace_probe.interventions.sources import Source
    from subspace_probe.interventions.steer import Steer

    generator = torch.Generator().manual_seed(0)
    subspace = Subspace.span(torch.randn(2, 128, generator=generator), site=Site(1), where=LAST, notes={"p": [0.1, 1]})
    source = Source(
        {Site(2, "z", head=1): torch.randn(2, 32, generator=generator).bfloat16(), Site(1): torch.randn(2, 128)},
        torch.arange(2),
        LAST,
    )
    return [
        Steer(subspace, 0.1 + 0.2, where=after(LAST)),
        Ablate(subspace),
        Ablate(sites=[Site(0, "mlp_out"), Site(-1, "attn_out")], where=at(-2)),
        Patch(source),
        Patch(Source.value(Site(1), torch.zeros(128)), ALL, subspace, outside=True),
    ]


def test_what_comes_back_does_the_same_bit_by_bit(chat: Any, tmp_path: Path) -> None:
    from subspace_probe.core.keys import content_key
    from subspace_probe.interventions.files import from_json, load_interventions, save_interventions, to_json

    before = made()
    after = load_interventions(save_interventions(tmp_path / "edits.json", *before))
    assert [content_key(edit) for edit in after] == [content_key(edit) for edit in before]
    assert to_json(*after) == to_json(*before)
    clean = chat.logits(PROMPTS)
    for old, new in zip(before, after, strict=True):
        generated = str(old.where).startswith("after")
        run = chat.generate if generated else chat.logits
        assert type(new) is type(old)
        assert repr(new) == repr(old)
        if generated:
            assert run(PROMPTS, interventions=[new]) == run(PROMPTS, interventions=[old])
        else:
            assert torch.equal(run(PROMPTS, interventions=[new]), run(PROMPTS, interventions=[old]))
            assert not torch.equal(run(PROMPTS, interventions=[new]), clean)  # control: it does something
    assert from_json(to_json()) == ()


def changed(path: str, value: Any) -> str:
    """The text of one ablation with an entry changed, or taken out."""
    from subspace_probe.interventions.files import to_json

    read = json.loads(to_json(made()[1]))
    *steps, last = path.split(".")
    place = read
    for name in steps:
        place = place[int(name) if name.isdigit() else name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(read)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("format", "other/1", "not of the format"),
        ("interventions", {}, "no list"),
        ("interventions.0.kind", "ablat", "Did you mean 'ablate'"),
        ("interventions.0.kind", "Site", "cannot be read"),
        ("interventions.0.strength", 3, "unexpected keyword"),
        ("interventions.0.subspace.basis", None, "missing"),
        ("interventions.0.subspace.basis.shape", [2, 64], "does not have"),
        ("interventions.0.subspace.basis.base64", "!!!!", "bytes cannot be read"),
        ("interventions.0.subspace.basis.tensor", "object", "does not have"),
        ("interventions.0.where.anchor", "nowhere", "nowhere"),
        ("interventions.0.where", "last", "not what a Ablate holds"),
        ("interventions.0.where.shift", 1.5, "not what a Where holds"),
        ("interventions.0.where.shift", "1", "not what a Where holds"),
        ("interventions.0.subspace.site", {"kind": "Where", "anchor": "all"}, "not what a Subspace holds"),
    ],
)
def test_a_changed_text_is_refused(path: str, value: Any, complaint: str) -> None:
    from subspace_probe.core.errors import SubspaceProbeError
    from subspace_probe.interventions.files import from_json

    with pytest.raises(SubspaceProbeError, match=complaint):
        from_json(changed(path, value))


def test_what_no_json_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from dataclasses import dataclass, replace

    from subspace_probe.core.errors import ConfigError, StoreError
    from subspace_probe.interventions.files import from_json, load_interventions, save_interventions, to_json

    @dataclass(frozen=True)
    class Mine:
        subspace: Any = None
        where: Any = None

        def edits(self, n_layers: int) -> Any: ...
        def parts(self, n_layers: int) -> Any: ...
        def with_subspace(self, subspace: Any) -> Any: ...

    ablate: Any = made()[1]
    with pytest.raises(ConfigError, match="Mine, which is not in the table"):
        save_interventions(tmp_path / "mine.json", Mine())
    with pytest.raises(ConfigError, match="which no JSON can hold"):
        to_json(replace(ablate, subspace=replace(ablate.subspace, notes={"fit": print})))
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="cannot be read"):
        load_interventions(tmp_path / "mine.json")
    for broken in ("[", "[" * 100_000):
        with pytest.raises(StoreError, match="no JSON"):
            from_json(broken)
