"""Generation of 64 tokens under one steering edit: ours beside repeng, steering-vectors, and no edit at all.

What a hook costs is far below what a clock on a busy machine can tell from a ratio of two long runs, so it is measured
on its own as well: in a network of one small block of the same width, with and without the edit, per generated token.
Ours, not steered, runs twice; the second one's ratio says how large a ratio means nothing.
"""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import subspace_probe as sp
from subspace_probe.core.subspaces import Subspace
from tests.benchmarks.side_by_side import Contestant, contestant, measure, report, settings
from tests.benchmarks.subjects import Padded, as_text, drawn, gpt2_small, padded, words

NEW, LAYER, LENGTH, PAIRS = 64, 6, 2.0, 60
Generate = Callable[[], Tensor]


def ours(model: sp.HookedModel, prompts: list[list[int]], steer: sp.Steer | None) -> Generate:
    """The backend's own loop, from token ids."""
    batch = model.tokens([as_text(prompt) for prompt in prompts])
    writes = steer.edits(model.spec.n_layers) if steer else {}
    return lambda: model.backend.generate(batch, writes=writes, max_new_tokens=NEW).ids


def transformers_generate(hf: Any, batch: Padded) -> Generate:
    """`generate` of Transformers, also what the other libraries call."""

    @torch.no_grad()
    def run() -> Tensor:
        made = hf.generate(
            batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        return made[:, batch.ids.shape[1] :]

    return run


def steered_reference(hf: Any, batch: Padded, step: Tensor) -> Tensor:
    """The plainest of hooks."""
    handle = hf.transformer.h[LAYER].register_forward_hook(lambda _m, _a, out: out + step)
    try:
        return transformers_generate(hf, batch)()
    finally:
        handle.remove()


def repeng(hf: Any, batch: Padded, step: Tensor) -> Generate:
    """Wraps the block, so it gets a private copy. 0.4.0 names a type that NumPy 2 has removed."""
    import numpy as np

    if not hasattr(np, "float_"):
        np.float_ = np.float64  # pyright: ignore[reportAttributeAccessIssue]
    from repeng import ControlModel

    model = ControlModel(copy.deepcopy(hf), [LAYER])
    model.set_raw_control({LAYER: step})
    return transformers_generate(model, batch)


def steering_vectors(hf: Any, batch: Padded, step: Tensor) -> Generate:
    """Its context manager around `generate`."""
    from steering_vectors import SteeringVector

    vector, generate = SteeringVector({LAYER: step}), transformers_generate(hf, batch)

    def run() -> Tensor:
        with vector.apply(hf):
            return generate()

    return run


def cost_of_a_token(step: Tensor) -> dict[str, float]:
    """Microseconds that the edit adds to one decoding step, hooks and all, and those of the edit called by itself."""
    hf = gpt2_small(n_layer=1, n_head=1, n_inner=8, vocab_size=64, bos_token_id=None, eos_token_id=None)
    model = sp.load_model(hf, tokenizer=words())
    prompts = drawn(8, 8, 20, vocab=64)
    steer = sp.Steer(Subspace.span(step, site=sp.Site(0)))
    plain, edited = ours(model, prompts, None), ours(model, prompts, steer)
    extra: list[float] = []
    for turn in range(PAIRS):  # whichever goes first, taken in turns
        pair = {run: _seconds(run) for run in ((plain, edited) if turn % 2 else (edited, plain))}
        extra.append(pair[edited] - pair[plain])
    from subspace_probe.core.edits import EditContext

    batch, x = model.tokens([as_text(prompt) for prompt in prompts]), torch.randn(8, 1, len(step))
    context = EditContext(batch, batch.lengths[:, None], torch.ones(8, 1, dtype=torch.bool), 1)
    edit = steer.edits(1)[sp.Site(0)]
    alone = median(_seconds(lambda: [edit(x, context) for _ in range(100)]) / 100 for _ in range(PAIRS))
    return {"hooked": 1e6 * median(extra[4:]) / NEW, "edit_alone": 1e6 * alone}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """The contestants, then the cost of a hook."""
    args = settings(__doc__ or "", rounds=3).parse_args()
    hf, prompts = gpt2_small(), drawn(8, 8, 20)
    (batch,) = padded(prompts, 8)
    step = torch.randn(hf.config.n_embd, generator=torch.Generator().manual_seed(1))
    step *= LENGTH / step.square().sum().sqrt()
    model = sp.load_model(hf, tokenizer=words())
    steer = sp.Steer(Subspace.span(step, site=sp.Site(LAYER)))
    plain, steered = transformers_generate(hf, batch)(), steered_reference(hf, batch, step)

    def unequal(expected: Tensor) -> Callable[[Tensor], float]:
        return lambda found: float((found != expected).sum())

    rows = measure(
        [
            Contestant("subspace-probe, plain", ours(model, prompts, None), unequal(plain)),
            Contestant("subspace-probe, plain again", ours(model, prompts, None), unequal(plain), "the A/A control"),
            Contestant("subspace-probe, steered", ours(model, prompts, steer), unequal(steered)),
            Contestant("Transformers, plain", transformers_generate(hf, batch), unequal(plain)),
            contestant("repeng", lambda: repeng(hf, batch, step), differs=unequal(steered)),
            contestant("steering-vectors", lambda: steering_vectors(hf, batch, step), differs=unequal(steered)),
        ],
        rounds=args.rounds,
    )
    cost = cost_of_a_token(step)
    share = 1e-6 * NEW * cost["hooked"] / median(rows[0].seconds)
    report(
        f"Greedy generation of {NEW} tokens, 8 prompts, an edit at layer {LAYER} of 12",
        rows,
        compared=f"tokens of {plain.numel()} unlike those of Transformers with a plain hook, or none",
        out=args.out,
        name="generation",
        microseconds_per_token=cost,
        share_of_generation=share,
        tokens_that_steering_changes=int((plain != steered).sum()),
    )


if __name__ == "__main__":
    main()
