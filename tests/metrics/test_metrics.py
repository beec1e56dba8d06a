"""Metrics against their definitions, computed another way."""

import math

import pytest
import torch


class _Tokens:
    """A tokenizer of five words."""

    words = ("yes", "no", "sorry", "sure", "she")

    def token_ids(self, words):
        return [self.words.index(word) for word in words]

    def behaviour_ids(self, behaviour):
        return self.token_ids({"refusal": ["sorry"], "harmful": ["yes"], "harmless": ["no"]}[behaviour])


def _logits() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3


def _prompts(**fields):
    from subspace_probe.core.prompts import Prompt

    return [Prompt(text=f"p{i}", **fields) for i in range(6)]


def test_refusal_score_is_the_published_log_odds() -> None:
    from subspace_probe.metrics import metric_for

    found = metric_for("refusal_score", _Tokens())(_logits(), _prompts())
    for row, value in zip(_logits().double(), found, strict=True):
        weights = [math.exp(v) for v in row.tolist()]
        p = weights[2] / sum(weights)
        assert float(value) == pytest.approx(math.log(p + 1e-8) - math.log(1 - p + 1e-8), abs=1e-9)


def test_refusal_score_saturates_where_the_published_one_does() -> None:
    from subspace_probe.metrics import metric_for

    sure = torch.tensor([[-200.0, -200, 200, -200, -200], [200.0, -200, -200, -200, -200]])
    found = metric_for("refusal_score", _Tokens())(sure, _prompts()[:2])
    assert found.tolist() == pytest.approx([math.log(1 + 1e-8) - math.log(1e-8), math.log(1e-8)], abs=1e-6)
    assert abs(float(found[1])) == pytest.approx(18.42068, abs=1e-4)


def test_judgement_and_logit_difference_ignore_a_shift_of_all_logits() -> None:
    from subspace_probe.metrics import metric_for

    logits, prompts = _logits(), _prompts(answer="she", foil="sure")
    for name in ("judgement_score", "logit_difference"):
        metric = metric_for(name, _Tokens())
        assert torch.allclose(metric(logits, prompts), metric(logits + 7.0, prompts), atol=1e-5)
    assert torch.allclose(
        metric_for("judgement_score", _Tokens())(logits, prompts), (logits[:, 0] - logits[:, 1]).double(), atol=1e-6
    )
    assert torch.allclose(
        metric_for("logit_difference", _Tokens())(logits, prompts), (logits[:, 4] - logits[:, 3]).double(), atol=1e-6
    )


def test_kl_is_that_of_torch_and_zero_on_itself() -> None:
    from subspace_probe.metrics.behaviour import kl, published_kl

    a, b = _logits(), _logits().flip(0)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (a, b))
    assert torch.allclose(kl(a, b), torch.distributions.kl_divergence(p, q), atol=1e-9)
    assert torch.allclose(kl(a, b), published_kl(a, b), atol=1e-2)
    assert float(kl(a, a).abs().max()) < 1e-12
    assert not torch.allclose(kl(a, b), kl(b, a), atol=1e-2)  # control: the order of arguments matters


def test_divergence_is_from_the_same_prompt_in_whatever_order_it_is_asked() -> None:
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.metrics.behaviour import DivergenceFrom, kl

    prompts, clean, edited = [Prompt(text="the same") for _ in range(6)], _logits(), _logits().flip(0)
    order = [4, 0, 5, 2]
    found = DivergenceFrom(prompts, clean)(edited[order], [prompts[i] for i in order])
    assert torch.equal(found, kl(clean, edited)[order])
    assert not torch.allclose(found, kl(clean[:4], edited[order]))  # control: rows as they come


def test_accuracy_needs_answers_and_says_where_they_miss() -> None:
    from subspace_probe.core.errors import DataError, UnknownName
    from subspace_probe.metrics import metric_for

    logits = torch.eye(5)[[4, 4, 0, 4, 4, 4]]
    assert metric_for("accuracy", _Tokens())(logits, _prompts(answer="she")).tolist() == [1, 1, 0, 1, 1, 1]
    with pytest.raises(DataError, match="needs 'answer' of every prompt, but 6 of 6 have none"):
        metric_for("accuracy", _Tokens())(logits, _prompts())
    with pytest.raises(UnknownName, match="Did you mean 'refusal_score'"):
        metric_for("refusal_scor", _Tokens())


def test_a_callable_is_a_metric() -> None:
    from subspace_probe.metrics import metric_for, name_of

    def biggest(logits, prompts):
        return logits.max(-1).values

    assert metric_for(biggest, _Tokens()) is biggest
    assert name_of(biggest) == "biggest"
