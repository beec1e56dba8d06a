"""One step of distributed alignment search: ours beside pyvene's low-rank rotation, on the same model, site and pairs.

GPT-2 small's shape with 6 layers, 16 bases of 15 tokens, rank 1, cross-entropy over the whole vocabulary, at the output
of layer 3. A step is: exchange, loss, gradient, Adam. What ours computes once (sources, and bases up to the
site) is timed apart and printed beside. Both then give their loss for one and the same direction.
"""

import time
from typing import Any

import torch
from torch import Tensor

import subspace_probe as sp
from subspace_probe.core.tokens import Where
from subspace_probe.finders.interchange import Interchange, cross_entropy, within
from subspace_probe.finders.interchange_training import Schedule, train
from tests.benchmarks.side_by_side import Contestant, Timed, contestant, measure, report, settings
from tests.benchmarks.subjects import as_text, drawn, gpt2_small, words

LAYER, BATCH, TOKENS, STEPS = 3, 16, 15, 8


def data() -> tuple[sp.Contrast, list[list[int]], list[int]]:
    """Sixteen prompts of random words, two labels, random answers: (contrast, ids, the token each should answer)."""
    ids = drawn(BATCH, TOKENS, TOKENS)
    answers = [100 + i for i in range(2 * BATCH)]
    prompts = tuple(
        sp.Prompt(text=as_text(row), answer=f"w{answers[2 * i]}", foil=f"w{answers[2 * i + 1]}")
        for i, row in enumerate(ids)
    )
    return sp.Contrast("random", prompts, tuple(i % 2 for i in range(BATCH))), ids, answers


def pyvene_model(hf: Any) -> Any:
    """Its intervention at the output of one block, the model's own weights frozen."""
    import pyvene

    config = pyvene.IntervenableConfig(
        [
            {
                "layer": LAYER,
                "component": "block_output",
                "low_rank_dimension": 1,
                "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
            }
        ]
    )
    model = pyvene.IntervenableModel(config, hf)
    model.set_device("cpu")
    model.disable_model_gradients()
    return model


def rotation(model: Any) -> Any:
    """The trained part."""
    found = next(iter(model.interventions.values()))
    return (found[0] if isinstance(found, tuple | list) else found).rotate_layer


def main() -> None:
    parser = settings(__doc__ or "", rounds=7)
    options = parser.parse_args()
    hf = gpt2_small(n_layer=6)
    contrast, ids, _ = data()
    model = sp.load_model(hf, tokenizer=words())
    tokens = torch.tensor(ids)
    for place in (TOKENS - 1, TOKENS // 2, 0):
        begin = time.perf_counter()
        task = Interchange(model, contrast, sp.Site(LAYER), Where("at", place), range(BATCH), batch_size=BATCH)
        prepared = time.perf_counter() - begin
        sources = task.sources(same=0.0, seed=0)
        labels = task.labels[None]
        wanted = task.wanted(labels, sources)

        def ours(task: Interchange = task, labels: Tensor = labels) -> Timed:
            plan = Schedule(STEPS)
            start = torch.nn.functional.normalize(
                torch.randn(1, 1, 768, generator=torch.Generator().manual_seed(0)), dim=-1
            )
            begin, used = time.perf_counter(), time.process_time()
            train(plan, task, labels, start)
            return Timed((time.perf_counter() - begin) / STEPS, (time.process_time() - used) / STEPS, None)

        def theirs(place: int = place, sources: Tensor = sources, wanted: Tensor = wanted) -> Any:
            other = pyvene_model(hf)
            optimiser = torch.optim.Adam(rotation(other).parameters(), lr=1e-3)
            bases, given = {"input_ids": tokens}, {"input_ids": tokens[sources]}

            def loss() -> Tensor:
                _, out = other(bases, [given], {"sources->base": place})
                return cross_entropy(out.logits[None, :, -1], wanted).mean()

            def run() -> Timed:
                begin, used = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    optimiser.zero_grad()
                    loss().backward()
                    optimiser.step()
                return Timed((time.perf_counter() - begin) / STEPS, (time.process_time() - used) / STEPS, None)

            run.loss = loss  # pyright: ignore[reportFunctionMemberAccess]
            run.weight = lambda: rotation(other).weight.detach().T  # pyright: ignore[reportFunctionMemberAccess]
            return run

        rows: list[Contestant] = [contestant("pyvene, low-rank rotation", theirs), Contestant("subspace-probe", ours)]
        facts: dict[str, Any] = {"prepared once, seconds": round(prepared, 3), "steps a round": STEPS}
        if rows[0].run is not None:
            with torch.no_grad():
                basis = rows[0].run.weight()[None]  # pyright: ignore[reportFunctionMemberAccess]
                own = float(task.score(within(basis), sources, labels)[0].mean())
                other = float(rows[0].run.loss())  # pyright: ignore[reportFunctionMemberAccess]
            facts["loss for pyvene's direction"] = (
                f"pyvene {other:.7f}, ours {own:.7f}, difference {abs(own - other):.1e}"
            )
        report(
            f"A DAS step, token {place} of {TOKENS}",
            measure(rows, rounds=options.rounds),
            compared="not compared; see the losses below",
            out=options.out,
            name=f"das-token-{place}",
            **facts,
        )


if __name__ == "__main__":
    main()
