"""Capture of the last token's residual stream: ours beside a plain forward pass and four libraries.

Two tasks: all 12 layers of a model of GPT-2 small's shape, and the lower half of them, where a pass can end early. 32
prompts of 8 to 64 tokens, 8 a batch, float32. Everybody else starts from padded batches of token ids, in the order in
which the prompts were drawn; ours starts from texts, so its time includes tokenising them, and it sorts by length.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.side_by_side import Contestant, contestant, measure, report, settings
from tests.benchmarks.subjects import Padded, as_text, drawn, gpt2_small, padded, words

PROMPTS, BATCH, LAYERS = 32, 8, 12
Capture = Callable[[], Tensor]


def reference(hf: Any, batches: list[Padded], layers: range) -> Tensor:
    """Last-token block outputs [layer, prompt, width], by the plainest of hooks."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        hf.transformer.h[layer].register_forward_hook(lambda _m, _a, out, layer=layer: kept[layer].append(out[:, -1]))
        for layer in layers
    ]
    plain(hf, batches)()
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(kept[layer]) for layer in layers])


def plain(hf: Any, batches: list[Padded]) -> Callable[[], None]:
    """The forward pass as a user would call it, logits of every token included; it captures nothing."""

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            hf(**batch.named, use_cache=False)

    return run


def hidden_states(hf: Any, batches: list[Padded]) -> Capture:
    """What Transformers itself offers."""

    @torch.no_grad()
    def run() -> Tensor:
        found = [hf(**batch.named, use_cache=False, output_hidden_states=True).hidden_states for batch in batches]
        return torch.stack([torch.cat([one[layer + 1][:, -1] for one in found]) for layer in range(LAYERS)])

    return run


def headless(hf: Any, batches: list[Padded]) -> Capture:
    """The same without the unembedding, which nothing here needs."""

    @torch.no_grad()
    def run() -> Tensor:
        found = [
            hf.base_model(**batch.named, use_cache=False, output_hidden_states=True).hidden_states for batch in batches
        ]
        return torch.stack([torch.cat([one[layer + 1][:, -1] for one in found]) for layer in range(LAYERS)])

    return run


def ours(hf: Any, prompts: list[list[int]], layers: range) -> Capture:
    """`model.capture`, from texts."""
    import subspace_probe as sp

    model = sp.load_model(hf, tokenizer=words())
    texts = [as_text(prompt) for prompt in prompts]

    def run() -> Tensor:
        acts = model.capture(texts, sites=sp.resid_post(*layers), where="last", batch_size=BATCH)
        return torch.stack([acts.at(sp.Site(layer)) for layer in layers])

    return run


def transformer_lens(batches: list[Padded], layers: range, *, stop: bool) -> Capture:
    """The bridge, over a private copy with the attention it wants; `pos_slice` keeps the last token only."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "random-gpt2", hf_model=gpt2_small(attn_implementation="eager"), tokenizer=words(), device="cpu"
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    missing = set(names) - set(bridge.hook_dict)
    if missing:  # it would leave them out of its cache silently
        raise ValueError(f"no hooks {sorted(missing)}")
    early = {"stop_at_layer": layers[-1] + 1} if stop else {}

    @torch.no_grad()
    def run() -> Tensor:
        found: list[Tensor] = []
        for batch in batches:
            _, cache = bridge.run_with_cache(
                batch.ids, attention_mask=batch.mask, names_filter=names, pos_slice=-1, **early
            )
            found.append(torch.stack([cache[name].flatten(1) for name in names]))
        return torch.cat(found, dim=1)

    return run


def nnsight_trace(hf: Any, batches: list[Padded], layers: range, *, stop: bool) -> Capture:
    """A trace that saves the last token of each block."""
    import nnsight

    model = nnsight.TransformersModel(copy.deepcopy(hf), tokenizer=words(), task="text-generation")

    @torch.no_grad()
    def run() -> Tensor:
        found: list[Tensor] = []
        for batch in batches:
            with model.trace({"input_ids": batch.ids, "attention_mask": batch.mask}) as tracer:
                kept = nnsight.save([])
                for layer in layers:
                    kept.append(model.get(f"transformer.h.{layer}").output[:, -1].clone())
                if stop:
                    tracer.stop()
            found.append(torch.stack(list(kept)))
        return torch.cat(found, dim=1)

    return run


def pyvene_collect(hf: Any, batches: list[Padded], layers: range) -> Capture:
    """One collecting intervention a layer."""
    import pyvene

    model = pyvene.IntervenableModel(
        [
            {
                "component": f"transformer.h[{layer}].output",
                "intervention": pyvene.CollectIntervention(keep_last_dim=True, embed_dim=hf.config.n_embd),
            }
            for layer in layers
        ],
        model=copy.deepcopy(hf),
    )

    @torch.no_grad()
    def run() -> Tensor:
        found: list[Tensor] = []
        for batch in batches:
            rows, last = len(batch.ids), batch.ids.shape[1] - 1
            where = {"base": [[[last]] * rows] * len(layers)}
            collected = model(base=batch.named, unit_locations=where)[0][1]
            found.append(torch.cat(collected).reshape(len(layers), rows, -1))
        return torch.cat(found, dim=1)

    return run


def differs(expected: Tensor, layers: slice = slice(None)) -> Callable[[Tensor], float]:
    """Largest absolute difference, over some of the layers."""
    return lambda found: float((found[layers] - expected[layers]).abs().max())


def main() -> None:
    """Both tasks."""
    parser = settings(__doc__ or "", rounds=5)
    rounds, out = (args := parser.parse_args()).rounds, args.out
    hf, prompts = gpt2_small(), drawn(PROMPTS, 8, 64)
    batches = padded(prompts, BATCH)
    everything, half = range(LAYERS), range(LAYERS // 2)
    expected = reference(hf, batches, everything)
    check, check_half = differs(expected), differs(expected[: len(half)])
    baseline = Contestant("Hugging Face, plain forward", plain(hf, batches), note="captures nothing; the baseline")
    tokenising = "from texts, tokenising included"

    rows = measure(
        [
            baseline,
            contestant("subspace-probe", lambda: ours(hf, prompts, everything), differs=check, note=tokenising),
            Contestant(
                "Hugging Face, hidden states",
                hidden_states(hf, batches),
                differs=differs(expected, slice(-1)),
                note="compared without its last entry, which has the final norm on it",
            ),
            Contestant(
                "Hugging Face, no unembedding",
                headless(hf, batches),
                differs=differs(expected, slice(-1)),
                note="likewise",
            ),
            contestant(
                "TransformerLens, run_with_cache",
                lambda: transformer_lens(batches, everything, stop=False),
                differs=check,
                note="eager attention, as it asks for",
            ),
            contestant("nnsight, trace", lambda: nnsight_trace(hf, batches, everything, stop=False), differs=check),
            contestant(
                "nnsight, trace and stop", lambda: nnsight_trace(hf, batches, everything, stop=True), differs=check
            ),
            contestant("pyvene, collect", lambda: pyvene_collect(hf, batches, everything), differs=check),
        ],
        rounds=rounds,
    )
    report(
        "Capture of resid_post at the last token, all 12 layers",
        rows,
        compared="largest, from forward hooks",
        out=out,
        name="capture",
        tokens={"real": sum(map(len, prompts)), "padded": sum(batch.ids.numel() for batch in batches)},
    )
    rows = measure(
        [
            baseline,
            contestant("subspace-probe", lambda: ours(hf, prompts, half), differs=check_half, note=tokenising),
            contestant(
                "TransformerLens, stop_at_layer",
                lambda: transformer_lens(batches, half, stop=True),
                differs=check_half,
                note="eager attention, as it asks for",
            ),
            contestant(
                "nnsight, trace and stop", lambda: nnsight_trace(hf, batches, half, stop=True), differs=check_half
            ),
        ],
        rounds=rounds,
    )
    report(
        "Capture of resid_post at the last token, layers 0 to 5 of 12",
        rows,
        compared="largest, from forward hooks",
        out=out,
        name="capture_half",
    )


if __name__ == "__main__":
    main()
