"""A fitted guard behind the server: the answers are the guard's own, whoever else asks at the same time."""

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.serve.inside import inside

if TYPE_CHECKING:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel


@pytest.fixture(scope="module")
def guard(chat: "HookedModel") -> "LatentGuard":
    import subspace_probe as sp
    from subspace_probe.guard.guard import LatentGuard

    requests = sp.load_contrast("organism:chat/requests", split="train").where(framing=0)
    negatives = sp.load_contrast("organism:chat/requests", split="test").where(label=0)
    return LatentGuard(chat, layers=[2]).fit(requests.sample(256, seed=0)).set_threshold(negatives, target_fpr=0.05)


def test_the_answers_are_the_guards(guard: "LatentGuard") -> None:
    import subspace_probe as sp
    from subspace_probe.guard.protocols import Judge

    assert isinstance(guard, Judge)
    texts = [prompt.shown for prompt in sp.load_contrast("organism:chat/requests", split="test").prompts[:60]]
    texts[7] = "we " * 500  # longer than the context

    async def main() -> None:
        async with inside(guard, max_batch=16) as (client, _):
            answers = await asyncio.gather(*(client.post("/v1/moderations", json={"input": text}) for text in texts))
            among = (await client.post("/v1/moderations", json={"input": [texts[0], texts[7]]})).json()["error"]
            tokens = (await client.post("/v1/tokens", json={"input": texts[0]})).json()
        error = answers.pop(7).json()["error"]
        assert (error["param"], error["code"]) == ("input", "invalid_input")
        assert "context of 128 tokens" in error["message"]
        assert among["param"] == "input[1]"
        assert "the first is input[1] with" in among["message"]
        assert "prompt 0" not in among["message"]
        own = guard.judge(texts[:7] + texts[8:])
        found = [answer.json()["results"][0]["latent_guard"] for answer in answers]
        assert [f["score"] for f in found] == pytest.approx([judged.score for judged in own], rel=1e-5)
        assert [f["flagged"] for f in found] == [judged.flagged for judged in own]
        assert 5 < sum(judged.flagged for judged in own) < 54
        assert guard.threshold is not None
        assert found[0]["bound"] == guard.threshold.bound
        assert tokens["scores"][tokens["position"]] == pytest.approx(own[0].score, rel=1e-5)
        assert tokens["text"][slice(*tokens["spans"][tokens["position"]])].strip() == texts[0].split()[-1]

    asyncio.run(main())
