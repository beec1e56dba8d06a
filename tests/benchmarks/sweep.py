"""A patching sweep: ours beside a loop of hooks and beside TransformerLens, on the same model and prompts.

GPT-2 small's shape with 6 layers and random weights, 4 pairs of prompts, `resid_pre` at every layer and token, the
difference of two logits. The loop is what people write: a whole pass a cell with one hook, all logits. At 60 tokens the
loop and TransformerLens are timed on every tenth token and scaled. Beside the sweep proper stand two others: one with a
metric that does not say which logits it reads, and one that skips cells whose states are equal. Prompts differ in one
token, and cells are counted as computed only where they are. Then: how the cost grows.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subspace_probe as sp
from subspace_probe.interventions.patch_sweep import PatchSweep, patch_sweep
from tests.benchmarks.side_by_side import Contestant, Timed, contestant, measure, report, settings
from tests.benchmarks.subjects import as_text, drawn, gpt2_small, words

ANSWER, FOIL = 11, 12


class Difference:
    """One logit minus another, saying which these are."""

    name = "logit_difference"

    def __call__(self, logits: Tensor, prompts: object) -> Tensor:
        return logits[:, ANSWER] - logits[:, FOIL]

    def tokens(self, prompts: Any) -> Tensor:
        return torch.tensor([[ANSWER, FOIL]] * len(prompts))


def silent(logits: Tensor, prompts: object) -> Tensor:
    """The same, saying nothing."""
    return logits[:, ANSWER] - logits[:, FOIL]


def pairs(count: int, tokens: int, *, place: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of random words, and partners that differ at one place, or everywhere for None."""
    rows = drawn(2 * count, tokens, tokens)
    clean, other = rows[:count], rows[count:]
    if place is None:
        return clean, other
    return clean, [[*row[:place], new[place], *row[place + 1 :]] for row, new in zip(clean, other, strict=True)]


def loop(hf: Any, clean: Tensor, corrupt: Tensor, positions: range) -> Tensor:
    """A pass with one hook for every layer and token; shape [layer, position, n]."""
    blocks, kept = hf.transformer.h, list[Tensor]()
    with torch.no_grad():
        handles = [block.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for block in blocks]
        hf(clean)
        for handle in handles:
            handle.remove()
        found: list[Tensor] = []
        for layer, block in enumerate(blocks):
            for position in positions:

                def patch(module: Any, args: Any, layer: int = layer, position: int = position) -> Any:
                    x = args[0].clone()
                    x[:, position] = kept[layer][:, position]
                    return (x, *args[1:])

                handle = block.register_forward_pre_hook(patch)
                found.append(silent(hf(corrupt).logits[:, -1], None))
                handle.remove()
    return torch.stack(found).view(len(blocks), len(positions), -1)


def lens(hf: Any, clean: Tensor, corrupt: Tensor, positions: range) -> Callable[[], Timed]:
    """TransformerLens, its own model from the same weights, by its own sweep over some of the positions."""
    import pandas
    from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

    settings = HookedTransformerConfig(
        n_layers=hf.config.n_layer,
        d_model=768,
        n_ctx=1024,
        d_head=64,
        n_heads=12,
        d_mlp=3072,
        d_vocab=hf.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
    )
    model = HookedTransformer(settings)
    model.load_state_dict(_converted(hf, settings), strict=False)
    with torch.no_grad():
        wrong = float((model(corrupt) - hf(corrupt).logits).abs().max())
    if wrong > 1e-3:
        raise ValueError(f"the weights did not arrive: logits are off by {wrong:.2g}")
    index = pandas.DataFrame(
        [(layer, position) for layer in range(hf.config.n_layer) for position in positions], columns=["layer", "pos"]
    )
    scale = corrupt.shape[1] / len(positions)

    def run() -> Timed:
        begin, used = time.perf_counter(), time.process_time()
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            found = patching.generic_activation_patch(
                model,
                corrupt,
                cache,
                lambda logits: silent(logits[:, -1], None).mean(),
                patching.layer_pos_patch_setter,
                "resid_pre",
                index_df=index,
            )
        seconds, processor = time.perf_counter() - begin, time.process_time() - used
        return Timed(scale * seconds, scale * processor, found.view(hf.config.n_layer, len(positions)))

    return run


def _converted(hf: Any, settings: Any) -> dict[str, Tensor]:
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    return convert_gpt2_weights(hf, settings)


def compare(tokens: int, step: int, rounds: int, out: Path) -> None:
    """All contestants at one length."""
    hf = gpt2_small(n_layer=6)
    model = sp.load_model(hf, tokenizer=words())
    ids = pairs(4, tokens, place=None)
    clean, corrupt = (torch.tensor(rows) for rows in ids)
    some = range(0, tokens, step)
    wanted = loop(hf, clean, corrupt, some)

    def ours(metric: Any = None, given: Any = ids, **rest: Any) -> PatchSweep:
        texts = [[as_text(row) for row in rows] for rows in given]
        return patch_sweep(model, texts[0], texts[1], metric or Difference(), **rest)

    def scaled() -> Timed:
        begin, used = time.perf_counter(), time.process_time()
        found = loop(hf, clean, corrupt, some)
        times = time.perf_counter() - begin, time.process_time() - used
        return Timed(times[0] * tokens / len(some), times[1] * tokens / len(some), found)

    def off(sweep: PatchSweep) -> float:
        return float((sweep.values[0][:, list(some)] - wanted).abs().max())

    one_apart = pairs(4, tokens, place=tokens // 3)
    equal = ours(given=one_apart, skip_equal=True)
    other = loop(hf, torch.tensor(one_apart[0]), torch.tensor(one_apart[1]), some)
    rows = [
        Contestant("subspace-probe", ours, off),
        Contestant("the same, all logits", lambda: ours(silent), off, "the metric does not say which it reads"),
        Contestant(
            "the same, equal states skipped",
            lambda: ours(given=one_apart, skip_equal=True),
            lambda sweep: float((sweep.values[0][:, list(some)] - other).abs().max()),
            f"prompts differ in token {tokens // 3}; {equal.skipped} of {equal.values.numel()} skipped",
        ),
        Contestant("a loop of hooks", scaled, lambda found: float((found - wanted).abs().max())),
        contestant(
            "TransformerLens, resid_pre",
            lambda: lens(hf, clean, corrupt, some),
            differs=lambda found: float((found - wanted.mean(-1)).abs().max()),
        ),
    ]
    report(
        f"A sweep over resid_pre, 6 layers x {tokens} tokens, 4 pairs",
        measure(rows, rounds=rounds),
        compared="from the loop of hooks",
        out=out,
        name=f"sweep-{tokens}",
        **{"timed positions": len(some), "largest value": float(wanted.abs().max()), "cells": 6 * tokens * 4},
    )


def growth(rounds: int, out: Path) -> None:
    """Seconds against layers, tokens and prompts; a table and a figure."""
    from plotly.subplots import make_subplots

    grown: dict[str, list[tuple[int, float]]] = {}
    for name, steps in {"layers": (2, 4, 8, 12), "tokens": (8, 16, 32, 64), "prompts": (1, 2, 4, 8, 16)}.items():
        for count in steps:
            shape = {"layers": 6, "tokens": 16, "prompts": 4, name: count}
            model = sp.load_model(gpt2_small(n_layer=shape["layers"]), tokenizer=words())
            texts = [[as_text(row) for row in rows] for rows in pairs(shape["prompts"], shape["tokens"], place=None)]
            best = float("inf")
            for _ in range(rounds):
                used = time.process_time()
                patch_sweep(model, texts[0], texts[1], Difference())
                best = min(best, time.process_time() - used)
            grown.setdefault(name, []).append((count, best))
            print(f"{name:8} {count:4} {best:8.3f} s of cpu")
    figure = make_subplots(1, len(grown), subplot_titles=list(grown), shared_yaxes=True)
    for column, (name, points) in enumerate(grown.items(), 1):
        xs, ys = zip(*points, strict=True)
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines+markers", row=1, col=column)
        figure.add_scatter(
            x=xs,
            y=[ys[0] * x / xs[0] for x in xs],
            mode="lines",
            line_dash="dot",
            name="in proportion",
            row=1,
            col=column,
        )
    figure.update_xaxes(type="log").update_yaxes(type="log")
    figure.update_yaxes(title_text="seconds of processor time", col=1).update_layout(showlegend=False)
    figure.write_html(out / "sweep-growth.html", include_plotlyjs=True)


def main() -> None:
    parser = settings(__doc__ or "", rounds=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[15, 60])
    parser.add_argument("--growth", action="store_true", help="also measure how the cost grows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        compare(
            tokens,
            10 if tokens >= 60 else 1,
            options.rounds if tokens < 60 else max(1, options.rounds // 2),
            options.out,
        )
    if options.growth:
        growth(2, options.out)


if __name__ == "__main__":
    main()
