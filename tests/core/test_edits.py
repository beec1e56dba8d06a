"""Edits touch what they say, out of place, and compose in order."""

import torch

from tests.core.test_tokens import batch


def test_an_edit_touches_its_tokens_only() -> None:
    from subspace_probe.core.edits import At, EditContext
    from subspace_probe.core.tokens import GENERATED, LAST

    shown = batch()
    ctx, x = EditContext(shown, shown.positions, shown.mask), torch.randn(2, 5, 4)
    before, rows = x.clone(), []
    edited = At(LAST, lambda states, row: (rows.append(row.tolist()), states + 1)[1])(x, ctx)
    assert torch.equal(x, before)
    assert torch.equal(edited[:, -1], x[:, -1] + 1)
    assert torch.equal(edited[:, :-1], x[:, :-1])
    assert rows == [[0, 1]]
    assert At(GENERATED, lambda states, row: states + 1)(x, ctx) is x


def test_where_every_token_is_edited_each_still_belongs_to_its_prompt() -> None:
    """No token is picked out then: the same change, in the same order, out of place and with its gradient."""
    from subspace_probe.core.edits import At, EditContext
    from subspace_probe.core.tokens import ALL

    shown = batch()
    whole = EditContext(shown, shown.positions, torch.ones_like(shown.mask))  # no pads among them
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, amounts = x.detach().clone(), torch.tensor([1.0, 10.0])
    edited = At(ALL, lambda states, row: states * amounts[row, None])(x, whole)
    assert torch.equal(edited, before * amounts[:, None, None])
    assert torch.equal(x.detach(), before)
    (gradient,) = torch.autograd.grad(edited.sum(), x)
    assert torch.equal(gradient, amounts[:, None, None].expand(2, 5, 4))
    rows = At(ALL, lambda states, row: states[:, [2, 0, 1, 3]])(x.transpose(0, 1).contiguous().transpose(0, 1), whole)
    assert torch.equal(rows, before[..., [2, 0, 1, 3]])  # states that do not lie in one piece


def test_pads_are_never_touched() -> None:
    from subspace_probe.core.edits import At, EditContext
    from subspace_probe.core.tokens import ALL, at

    shown = batch()
    ctx, x = EditContext(shown, shown.positions, shown.mask), torch.zeros(2, 5, 4)
    assert At(ALL, lambda states, row: states + 1)(x, ctx)[..., 0].tolist() == [[1.0] * 5, [0, 0, 1, 1, 1]]
    # pads carry position 0, as the first token does
    assert At(at(0), lambda states, row: states + 1)(x, ctx)[..., 0].tolist() == [[1.0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_edits_of_one_site_apply_in_the_order_given() -> None:
    from subspace_probe.core.edits import At, EditContext, compose
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL

    shown = batch()
    ctx, x = EditContext(shown, shown.positions, shown.mask), torch.ones(2, 5, 4)
    add, double = At(ALL, lambda states, row: states + 1), At(ALL, lambda states, row: states * 2)
    first, second = compose({Site(1): add}, {Site(1): double}), compose({Site(1): double}, {Site(1): add})
    assert first[Site(1)](x, ctx)[0, 0, 0] == 4
    assert second[Site(1)](x, ctx)[0, 0, 0] == 3
    assert set(compose({Site(0): add}, {}, {Site(1): add})) == {Site(0), Site(1)}
    assert compose() == {}


def test_stacked_edits_each_see_their_own_copy() -> None:
    from subspace_probe.core.edits import At, EditContext, Stacked
    from subspace_probe.core.tokens import ALL, LAST

    shown = batch()
    both = shown.repeat(3)
    ctx, x = EditContext(both, both.positions, both.mask), torch.zeros(6, 5, 4)
    seen = []
    edits = [
        At(ALL, lambda states, row: (seen.append(row.tolist()), states + 1)[1]),
        None,
        At(LAST, lambda states, row: (seen.append(row.tolist()), states + 2)[1]),
    ]
    edited = Stacked(edits, shown)(x, ctx)[..., 0]
    assert edited.tolist() == [
        [1.0] * 5,
        [0, 0, 1, 1, 1],
        [0.0] * 5,
        [0.0] * 5,
        [0, 0, 0, 0, 2],
        [0, 0, 0, 0, 2],
    ]
    assert seen == [[0] * 5 + [1] * 3, [0, 1]]  # rows are counted within the copy


def test_an_edit_keeps_the_dtype_and_the_gradient() -> None:
    from subspace_probe.core.edits import At, EditContext
    from subspace_probe.core.tokens import LAST

    shown, vector = batch(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    ctx, x = EditContext(shown, shown.positions, shown.mask), torch.zeros(2, 5, 4, dtype=torch.bfloat16)
    edited = At(LAST, lambda states, row: states + vector)(x, ctx)
    assert edited.dtype == torch.bfloat16
    edited.sum().backward()
    assert vector.grad is not None
    assert vector.grad.tolist() == [2.0] * 4
