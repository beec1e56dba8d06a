"""Activations keep rows, prompts and labels together."""

from typing import TYPE_CHECKING

import pytest
import torch

from tests.planted import activations as rows_of

if TYPE_CHECKING:
    from subspace_probe.core.activations import Activations


def activations(per_prompt: int = 1) -> "Activations":
    """Twelve prompts in six pairs; the first column says which prompt a row is from."""
    from subspace_probe.core.activations import Activations, MemoryRows
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL, LAST
    from tests.core.test_contrasts import contrast

    labels = [i % 2 for i in range(12)]
    data = contrast(
        labels, pairs=tuple(i // 2 for i in range(12)), factors={"refused": tuple(i // 6 for i in range(12))}
    )
    prompt = torch.arange(12).repeat_interleave(per_prompt)
    position = torch.arange(12 * per_prompt) % per_prompt
    rows = torch.stack([prompt.float(), position.float(), torch.randn(12 * per_prompt)], dim=1)
    tensors = {Site(0): rows, Site(1): rows * 2}
    return Activations(MemoryRows(tensors), data, prompt, position, LAST if per_prompt == 1 else ALL)


def test_labels_follow_their_prompts() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.core.sites import Site

    acts = activations(per_prompt=3)
    assert acts.rows.n == 36
    assert acts.labels.tolist() == [i % 2 for i in range(12) for _ in range(3)]
    assert acts.pairs.tolist() == acts.groups.tolist() == [i // 2 for i in range(12) for _ in range(3)]
    assert acts.factor("refused").tolist() == [0] * 18 + [1] * 18
    assert acts.rows.width(Site(1)) == 3
    with pytest.raises(UnknownName, match=r"Unknown factor 'refuse'\. Did you mean 'refused'"):
        acts.factor("refuse")


def test_selections_and_splits_keep_rows_with_their_prompts() -> None:
    from subspace_probe.core.sites import Site

    acts = activations(per_prompt=2)
    chosen = acts.select(label=1, refused=0)
    assert chosen.at(Site(0))[:, 0].tolist() == [1, 1, 3, 3, 5, 5]
    assert [chosen.contrast.prompts[p].text for p in chosen.prompt.tolist()] == ["1", "1", "3", "3", "5", "5"]
    assert torch.equal(chosen.at(Site(1)), chosen.at(Site(0)) * 2)
    first, second = acts.split(0.5, seed=0)
    assert not set(first.pairs.tolist()) & set(second.pairs.tolist())
    for part in (first, second):
        texts = [float(part.contrast.prompts[p].text) for p in part.prompt.tolist()]
        assert part.at(Site(0))[:, 0].tolist() == texts
        assert part.labels.tolist() == [int(text) % 2 for text in texts]
    assert acts.relabel("refused").labels.tolist() == acts.factor("refused").tolist()
    assert acts.with_labels((1,) * 12).labels.tolist() == [1] * 24


def test_one_prompt_object_in_both_halves_stays_where_it_was_put() -> None:
    """The same text twice, in unrelated pairs: rows are split by number, not by the prompt they share."""
    from dataclasses import replace

    acts = activations()
    shared = replace(acts.contrast, prompts=(acts.contrast.prompts[0],) * 12)
    first, second = replace(acts, contrast=shared).split(0.5, seed=0)
    assert (first.rows.n, second.rows.n) == (6, 6)


def test_blocks_are_the_whole() -> None:
    from subspace_probe.core.sites import Site

    acts = activations(per_prompt=3)
    blocks = list(acts.batches(Site(1), size=7))
    assert [len(labels) for _, labels in blocks] == [7, 7, 7, 7, 7, 1]
    assert torch.equal(torch.cat([rows for rows, _ in blocks]), acts.at(Site(1)))
    assert torch.equal(torch.cat([labels for _, labels in blocks]), acts.labels)


def test_four_heavy_rows_take_the_first_component_until_they_are_left_out() -> None:
    """Rows as the first tokens of texts are: norm 300, along one axis, among rows with a planted axis of their own."""
    from subspace_probe.core.sites import Site

    generator = torch.Generator().manual_seed(0)
    n, d = 2000, 64
    planted, other = torch.linalg.qr(torch.randn(d, 2, generator=generator)).Q.T
    x = torch.randn(n, d, generator=generator) + 4 * torch.randn(n, 1, generator=generator) * planted
    heavy = [3, 700, 1201, 1999]
    x[heavy] = x[heavy] / x[heavy].norm(dim=1, keepdim=True) + 300 * other
    acts = rows_of(x, torch.arange(len(x)) % 2)

    def top(a: "Activations") -> torch.Tensor:
        return torch.linalg.eigh(torch.cov(a.at(Site(0)).double().T)).eigenvectors[:, -1].float()

    assert abs(float(top(acts) @ other)) > 0.999  # the trouble
    found = acts.heavy_rows(Site(0))
    assert found.tolist() == heavy
    left = acts.without(found)
    assert abs(float(top(left) @ planted)) > 0.99
    assert left.heavy_rows(Site(0)).tolist() == []


def test_rows_left_out_are_left_out_of_everything_and_read_as_they_lie() -> None:
    from subspace_probe.core.errors import DataError, ShapeError
    from subspace_probe.core.sites import Site

    acts = activations(per_prompt=2)
    gone = torch.tensor([0, 1, 5, 23])  # both rows of the first prompt
    left = acts.without(gone)
    same = acts.take(torch.tensor([row for row in range(24) if row not in gone.tolist()]))
    assert left.rows.n == same.rows.n == 20
    assert left.contrast == same.contrast
    assert len(left.contrast) == 11
    for name in ("prompt", "position", "labels", "pairs", "groups"):
        assert torch.equal(getattr(left, name), getattr(same, name))
    for size in (1, 7, 100):
        blocks = [block for block, _ in left.batches(Site(1), size=size)]
        assert torch.equal(torch.cat(blocks), same.at(Site(1)))
    assert left.rows.read(Site(1), 50, 60).shape == (0, 3)
    again = left.without(torch.tensor([0]))  # once more: a selection of a selection
    assert torch.equal(again.at(Site(0)), same.at(Site(0))[1:])
    assert torch.equal(acts.without(torch.zeros(0, dtype=torch.long)).at(Site(0)), acts.at(Site(0)))
    with pytest.raises(ShapeError, match=r"Rows 3 to 24 were to be left out of 24"):
        acts.without(torch.tensor([3, 24]))
    with pytest.raises(DataError, match="All 24 rows were to be left out"):
        acts.without(torch.arange(24))


def test_rows_left_out_are_read_a_block_at_a_time() -> None:
    """What lies on disk stays there."""
    from dataclasses import replace

    from subspace_probe.core.sites import Site

    acts = activations(per_prompt=3)

    class Watched:
        sites, n = acts.rows.sites, acts.rows.n
        asked: list[tuple[int, int]]

        def __init__(self) -> None:
            self.asked = []

        def width(self, site: Site) -> int:
            return acts.rows.width(site)

        def read(self, site: Site, start: int, stop: int) -> torch.Tensor:
            self.asked.append((start, stop))
            return acts.rows.read(site, start, stop)

    rows = Watched()
    left = replace(acts, rows=rows).without(torch.tensor([2, 3, 20]))
    assert rows.asked == []
    assert sum(len(block) for block, _ in left.batches(Site(0), size=10)) == 33
    assert rows.asked == [(0, 12), (12, 23), (23, 33), (33, 36)]


def test_heavy_rows_need_more_rows_than_coordinates() -> None:
    """With fewer the average row would be heavy: on 12 rows of width 16 without any outlier most would be."""
    from subspace_probe.core.errors import DataError
    from subspace_probe.core.sites import Site

    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    squares = x.square().sum(1)
    assert int((squares >= squares.sum() / 16).sum()) > 6
    with pytest.raises(DataError, match="12 rows of width 16"):
        rows_of(x, torch.arange(len(x)) % 2).heavy_rows(Site(0))


def test_what_is_missing_or_broken_is_named() -> None:
    from subspace_probe.core.errors import ShapeError, SiteError
    from subspace_probe.core.sites import Site

    acts = activations()
    for call in (lambda: acts.at(Site(5)), lambda: list(acts.batches(Site(5)))):
        with pytest.raises(SiteError, match=r"L5.resid_post was asked for, but these activations hold L0"):
            call()
    acts.at(Site(1))[7, 0] = float("nan")
    acts.at(Site(1))[9, 2] = float("inf")
    with pytest.raises(ShapeError, match=r"at L1.resid_post are not finite in 1 rows \(7\)"):
        list(acts.batches(Site(1), size=8))
    assert repr(acts) == "Activations(12 rows at last of 'numbers': L0.resid_post, L1.resid_post)"
