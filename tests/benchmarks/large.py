"""What needs a CUDA device: memory and speed of a capture, a model on two devices, the backends against each other.

A model of a billion random weights, llama's architecture, bfloat16; nothing is downloaded. Without a CUDA device it
says so and ends. `--size small` is a model of a few million weights, to try the script itself.
"""

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subspace_probe as sp
from subspace_probe.core.errors import SubspaceProbeError
from subspace_probe.core.subspaces import Subspace
from subspace_probe.models import BACKENDS
from tests.benchmarks.side_by_side import Contestant, measure, report, settings
from tests.benchmarks.subjects import VOCAB, as_text, drawn, padded, words

BATCH, PROMPTS = 8, 64
SIZES: dict[str, dict[str, int]] = {
    "billion": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
}
MEGABYTE = 2**20
Facts = dict[str, Any]


def llama(size: str, *, dtype: torch.dtype, device: str) -> Any:
    """Random weights, drawn from seed 0 on the device itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], num_key_value_heads=8, vocab_size=VOCAB, max_position_embeddings=2048)
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def weight_of(hf: Any) -> int:
    """Bytes of the weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in hf.parameters())


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes on the device at the worst moment, what was there before included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def memory(hf: Any, texts: Sequence[str], prompts: list[list[int]]) -> Facts:
    """Peak of a capture of every layer, against the weights and one batch's plain pass through the blocks."""
    model = sp.load_model(hf, tokenizer=words())
    longest = sorted(prompts, key=len)[-BATCH:]
    (batch,) = padded(longest, BATCH)
    inputs = {name: value.cuda() for name, value in batch.named.items()}

    @torch.no_grad()
    def one_batch() -> None:
        hf.base_model(**inputs, use_cache=False)

    def capture() -> None:
        model.capture(texts, sites="resid_post", where="last", batch_size=BATCH)

    capture()  # the first call fills caches of its own
    held, plain, ours = torch.cuda.memory_allocated(), peak_of(one_batch), peak_of(capture)
    state = batch.ids.numel() * hf.config.hidden_size * hf.dtype.itemsize
    return {
        "weights MB": weight_of(hf) / MEGABYTE,
        "held before MB": held / MEGABYTE,
        "peak of one plain batch, no unembedding MB": plain / MEGABYTE,
        "peak of the capture MB": ours / MEGABYTE,
        "the residual stream of that batch at every layer would be MB": state * hf.config.num_hidden_layers / MEGABYTE,
    }


def speed(hf: Any, texts: Sequence[str], prompts: list[list[int]], *, rounds: int, out: Path, facts: Facts) -> None:
    """Capture of every layer against a plain pass with logits, from the same prompts."""
    model = sp.load_model(hf, tokenizer=words())
    batches = padded(prompts, BATCH)

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            hf(**{name: value.cuda() for name, value in batch.named.items()}, use_cache=False)
        torch.cuda.synchronize()

    @torch.no_grad()
    def expected() -> Tensor:
        found: list[Tensor] = []
        for prompt in prompts:  # one at a time: no padding, and the plainest of hooks
            kept: list[Tensor] = []
            handles = [
                block.register_forward_hook(lambda _m, _a, output, kept=kept: kept.append(output[0, -1]))
                for block in hf.model.layers
            ]
            hf.base_model(torch.tensor([prompt]).cuda(), use_cache=False)
            for handle in handles:
                handle.remove()
            found.append(torch.stack(kept))
        return torch.stack(found, dim=1).float().cpu()

    reference = expected()
    largest = float(reference.abs().max())

    def capture() -> Tensor:
        acts = model.capture(texts, sites="resid_post", where="last", batch_size=BATCH)
        return torch.stack([acts.at(site) for site in acts.sites]).float()

    def differs(found: Tensor) -> float:
        return float((found - reference).abs().max()) / largest

    rows = measure(
        [
            Contestant("plain forward", plain, note="captures nothing; the baseline"),
            Contestant("subspace-probe", capture, differs, "from texts, tokenising included"),
        ],
        rounds=rounds,
    )
    report(
        f"Capture of resid_post at the last token, every layer, {hf.dtype}, batches of {BATCH}",
        rows,
        compared="largest, over the largest value, from one unpadded prompt at a time",
        out=out,
        name="large",
        **facts,
    )


def spread(size: str, texts: Sequence[str]) -> Facts:
    """A model whose weights are on the GPU and the CPU, read and steered at every layer, against one on the GPU."""
    with tempfile.TemporaryDirectory() as name:
        whole = llama(size, dtype=torch.bfloat16, device="cuda")
        whole.save_pretrained(name)
        # the first GPU gets 60 % of the weights, so that some blocks do not fit
        room: dict[int | str, int] = {0: int(0.6 * weight_of(whole)), "cpu": 64 * 2**30}
        split = sp.load_model(Path(name), tokenizer=words(), dtype=torch.bfloat16, device_map="auto", max_memory=room)
        places = sorted({str(place) for place in getattr(split.backend.hf, "hf_device_map", {}).values()})
        facts: Facts = {"devices": places}
        if len(places) < 2:
            return {"spread": f"skipped: everything was put on {places}"}
        one = sp.load_model(whole, tokenizer=words())
        facts["capture differs"] = _captures_differ(one, split, texts)
        worst = 0.0
        for layer in range(one.spec.n_layers):
            worst = max(worst, _steered_differ(one, split, texts, layer))
        facts["steered logits differ"] = worst
        return facts


def backends(size: str, texts: Sequence[str]) -> Facts:
    """The other backends against the native one, on the GPU in float32, where differences mean something."""
    facts: Facts = {}
    native = sp.load_model(llama(size, dtype=torch.float32, device="cuda"), tokenizer=words())
    for name in sorted(set(BACKENDS) - {"native"}):
        # a private copy each: those libraries change the modules they wrap
        copied = llama(size, dtype=torch.float32, device="cuda")

        def compared(name: str = name, copied: Any = copied) -> Facts:
            other = sp.load_model(copied, tokenizer=words(), backend=name)
            return {
                "capture differs": _captures_differ(native, other, texts),
                "steered logits differ": _steered_differ(native, other, texts, native.spec.n_layers // 2),
            }

        facts[name] = _tried(compared)
    return facts


def _tried(run: Callable[[], Any]) -> Any:
    """What it returns, or why it failed: one part that fails must not take the numbers of the others with it."""
    try:
        return run()
    except (SubspaceProbeError, ImportError, RuntimeError, ValueError, TypeError) as error:
        return f"failed: {type(error).__name__}: {str(error).strip()[:300]}"


def _captures_differ(one: sp.HookedModel, other: sp.HookedModel, texts: Sequence[str]) -> float:
    found, again = (model.capture(texts, where="last", batch_size=BATCH) for model in (one, other))
    return max(_relative(found.at(site), again.at(site)) for site in found.sites)


def _steered_differ(one: sp.HookedModel, other: sp.HookedModel, texts: Sequence[str], layer: int) -> float:
    direction = torch.randn(one.spec.d_model, generator=torch.Generator().manual_seed(layer))
    steer = sp.Steer(Subspace.span(direction, site=sp.Site(layer)), strength=0.1)
    plain = one.logits(texts)
    steered = one.logits(texts, interventions=[steer])
    if _relative(plain, steered) == 0.0:
        raise RuntimeError(f"steering at layer {layer} changed nothing, so agreement would mean nothing")
    return _relative(steered, other.logits(texts, interventions=[steer]))


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected.double() - found.double()).abs().max() / expected.double().abs().max())


def main() -> None:
    """Everything, or a line that says why nothing."""
    parser = settings(__doc__ or "", rounds=5)
    parser.add_argument("--size", choices=sorted(SIZES), default="billion")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("large: skipped, this machine has no CUDA device")
        return
    prompts = drawn(PROMPTS, 64, 512)
    texts = [as_text(prompt) for prompt in prompts]
    hf = llama(args.size, dtype=torch.bfloat16, device="cuda")
    facts: Facts = {"memory": memory(hf, texts, prompts)}
    facts["on two devices"] = _tried(lambda: spread(args.size, texts[:BATCH]))
    facts["other backends against native"] = _tried(lambda: backends(args.size, texts[:BATCH]))
    speed(hf, texts, prompts, rounds=args.rounds, out=args.out, facts=facts)


if __name__ == "__main__":
    main()
