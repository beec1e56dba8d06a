"""Activations keep rows, prompts and labels together."""

from typing import TYPE_CHECKING

import pytest
import torch

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
