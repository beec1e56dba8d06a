"""The lens on states whose answers are known, and on states that say only which fact is asked for."""

import torch


def _planted(carried: bool) -> float:
    from subspace_probe.finders.answer_lens import answer_lens

    draw = torch.Generator().manual_seed(0)
    unembedding = torch.randn(60, 16, generator=draw)
    inside = torch.randn(16, 40, generator=draw)  # how answers lie in states of width 40
    told, asked = torch.randint(40, (400,), generator=draw), torch.arange(40, 60)
    noise = 0.1 * torch.randn(420, 40, generator=draw)
    states = unembedding[told] @ inside + noise[:400]
    held_out = (unembedding[asked] if carried else torch.randn(20, 16, generator=draw)) @ inside + noise[400:]
    seen = answer_lens(states, unembedding[told], held_out, unembedding[asked], draws=40)
    assert seen.shuffled.shape == (40, 20)
    assert float((seen.shuffled == torch.arange(20)).double().mean()) < 0.15  # chance is 1 of 20
    return float((seen.read == torch.arange(20)).double().mean())


def test_answers_never_fitted_on_are_read_where_states_carry_them_and_only_there() -> None:
    assert _planted(carried=True) >= 0.9
    assert _planted(carried=False) <= 0.2


def test_the_dual_form_is_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    from subspace_probe.finders.answer_lens import answer_lens

    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 12, generator=draw).double(), torch.randn(30, 12, generator=draw).double()
    told, rows = torch.randn(50, 6, generator=draw).double(), torch.randn(9, 6, generator=draw).double()
    found = answer_lens(x.float(), told.float(), y.float(), rows.float(), penalty=0.1)
    unit = torch.nn.functional.normalize(torch.cat([told, rows]) - told.mean(0), dim=1)
    scale = [(part - x.mean(0)) / x.std(0, correction=0) for part in (x, y)]
    ridge = Ridge(alpha=0.1 * 50, fit_intercept=False).fit(scale[0].numpy(), unit[:50].numpy())
    wanted = (torch.from_numpy(ridge.predict(scale[1].numpy())) @ unit[50:].T).argmax(1)
    assert torch.equal(found.read, wanted)
