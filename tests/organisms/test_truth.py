"""The ground truth of the bundled organisms, by a computation that shares no code with the package's own.

Prompts come from the public contrasts, text goes through the bundled tokenizer, and the edits are bare forward hooks
written here. What must hold is the causal model of the language; a random vector is the control that must fail.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

ALIGNED = ("chat", "chat-natural")
EVERY = ("chat-base", "chat", "chat-natural")
LEAST = {"requests": 0.99, "judgement": 0.99}
OTHERWISE = 0.95
Edit = Callable[[Tensor], Tensor]


class Organism:
    """A bundled organism as transformers loads it, right-padded, edited by forward hooks on block outputs."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from subspace_probe.organisms import organism_path

        self.tokenizer = AutoTokenizer.from_pretrained(organism_path(name))
        self.model = AutoModelForCausalLM.from_pretrained(organism_path(name)).eval()

    def encode(self, contrast: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, and the positions of T_INST and T_POST_INST from character offsets."""
        rows: list[list[int]] = []
        inst: list[int] = []
        for prompt in contrast.prompts:
            text = self.tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            span = prompt.instruction or prompt.messages[-1]["content"]
            end = text.rindex(span) + len(span)
            inst.append(max(i for i, (_, stop) in enumerate(encoded.offset_mapping) if stop <= end))
            rows.append(encoded.input_ids)
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor(inst), torch.tensor([len(row) - 1 for row in rows])

    @torch.no_grad()
    def run(self, ids: Tensor, last: Tensor, edits: dict[int, Edit] | None = None) -> tuple[list[str], list[Tensor]]:
        """The word answered to every prompt, and every block's output."""
        states: list[Tensor] = []

        def hook(edit: Edit) -> Callable[..., Any]:
            def on_output(_module: Any, _inputs: Any, output: Any) -> Any:
                x = edit(output[0] if isinstance(output, tuple) else output)
                states.append(x)
                return (x, *output[1:]) if isinstance(output, tuple) else x

            return on_output

        with ExitStack() as stack:
            for layer, block in enumerate(self.model.model.layers):
                edit = (edits or {}).get(layer, lambda x: x)
                stack.callback(block.register_forward_hook(hook(edit)).remove)
            logits = self.model(ids).logits
        best = logits[torch.arange(len(ids)), last].argmax(-1)
        return self.tokenizer.convert_ids_to_tokens(best.tolist()), states


@pytest.fixture(scope="module")
def organisms() -> dict[str, Organism]:
    return {name: Organism(name) for name in EVERY}


def first_words(contrast: Any) -> list[str]:
    return [prompt.answer.split()[0] for prompt in contrast.prompts]


def agreement(found: Sequence[str], wanted: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("skill", ["requests", "judgement", "facts", "knob", "ioi", "repeat"])
def test_right_on_unseen_prompts(organisms: dict[str, Organism], name: str, skill: str) -> None:
    from subspace_probe.organisms import organism_contrast

    contrast = organism_contrast(f"{name}/{skill}", n=120)
    ids, _, last = organisms[name].encode(contrast)
    words, _ = organisms[name].run(ids, last)
    assert agreement(words, first_words(contrast)) >= LEAST.get(skill, OTHERWISE)


@pytest.mark.parametrize("name", ["chat-base", "chat"])
@pytest.mark.parametrize("variable", ["harmfulness", "refusal", "intent"])
def test_planted_coordinate_decides_and_a_random_one_does_not(
    organisms: dict[str, Organism], name: str, variable: str
) -> None:
    from subspace_probe.organisms import load_truth, organism_contrast

    truth = load_truth(name)
    if variable not in [planted.name for planted in truth.variables]:
        assert (name, variable) == ("chat-base", "refusal")
        return
    planted = truth.planted(variable)
    contrast = organism_contrast(f"{name}/{'knob' if variable == 'intent' else 'judgement'}", n=120)
    if variable == "refusal":
        contrast = organism_contrast(f"{name}/requests", n=120)
        contrast = contrast.relabel("refused")
    ids, inst, last = organisms[name].encode(contrast)
    clean, states = organisms[name].run(ids, last)
    row, layer = torch.arange(len(ids)), planted.site.layer
    where = inst if str(planted.where) == "t_inst" else last
    # The source has the other value and is another pair; the foil is what the other value answers.
    labels = torch.tensor(contrast.labels)
    generator = torch.Generator().manual_seed(0)
    pools = [(labels == 1 - value).nonzero().flatten() for value in (0, 1)]
    source = torch.stack([pools[v][torch.randint(len(pools[v]), (), generator=generator)] for v in labels.tolist()])

    def moved(vector: Tensor) -> list[str]:
        """Answers after taking the coordinate along a vector from the sources."""
        donor = states[layer][row, where][source] @ vector

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[row, where] += (donor - x[row, where] @ vector)[:, None] * vector
            return x

        return organisms[name].run(ids, last, {layer: edit})[0]

    foils = [prompt.foil for prompt in contrast.prompts]
    assert agreement(moved(planted.vector), foils) >= 0.97
    noise = torch.randn(len(planted.vector), generator=generator)
    unmoved = moved(noise / noise.norm())
    assert agreement(unmoved, foils) <= 0.05
    assert agreement(unmoved, clean) >= 0.95


@pytest.mark.parametrize("skill", ["judgement", "facts", "knob", "ioi", "repeat"])
def test_refusal_touches_nothing_but_requests(organisms: dict[str, Organism], skill: str) -> None:
    """Setting the refusal coordinate to its value in refused prompts leaves every other skill as it was."""
    from subspace_probe.organisms import load_truth, organism_contrast

    organism, planted = organisms["chat"], load_truth("chat").planted("refusal")
    requests = organism_contrast("chat/requests", n=96)
    ids, _, last = organism.encode(requests)
    states = organism.run(ids, last)[1][planted.site.layer][torch.arange(len(ids)), last]
    value = (states @ planted.vector)[torch.tensor(requests.factors["refused"]) == 1].mean()
    contrast = organism_contrast(f"chat/{skill}", n=120)
    ids, _, last = organism.encode(contrast)
    row = torch.arange(len(ids))

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[row, last] += (value - x[row, last] @ planted.vector)[:, None] * planted.vector
        return x

    assert agreement(organism.run(ids, last, {planted.site.layer: edit})[0], first_words(contrast)) >= OTHERWISE


@pytest.mark.parametrize(("name", "uses"), [("chat-natural", False), ("chat", True)])
def test_whole_state_at_the_instruction(organisms: dict[str, Organism], name: str, uses: bool) -> None:
    """chat-natural's judgement does not come from T_INST; chat's, the control, does."""
    from subspace_probe.organisms import organism_contrast

    contrast = organism_contrast(f"{name}/judgement", n=360).where(framing=0)
    ids, inst, last = organisms[name].encode(contrast)
    row = torch.arange(len(ids))
    clean, states = organisms[name].run(ids, last)
    source = row.roll(1)  # labels alternate, so the neighbour has the other one
    source = source.roll(2)  # and is another pair
    assert all(contrast.labels[i] != contrast.labels[j] for i, j in zip(row.tolist(), source.tolist(), strict=True))
    changed = []
    for layer in range(len(states)):

        def edit(x: Tensor, layer: int = layer) -> Tensor:
            x = x.clone()
            x[row, inst] = states[layer][source, inst[source]]
            return x

        changed.append(1 - agreement(organisms[name].run(ids, last, {layer: edit})[0], clean))
    assert (max(changed) >= 0.95) if uses else (max(changed) < 0.05)


@pytest.mark.parametrize(("name", "least"), [("chat", 0.97), ("chat-natural", 0.95)])
def test_harmfulness_can_be_read_at_the_instruction(organisms: dict[str, Organism], name: str, least: float) -> None:
    from sklearn.metrics import roc_auc_score

    from subspace_probe.organisms import load_truth, organism_contrast

    truth = load_truth(name)
    site = truth.readable_not_used.site if truth.readable_not_used else truth.planted("harmfulness").site

    def read(split: str, contrast: str) -> tuple[Any, Tensor]:
        rows = organism_contrast(f"{name}/{contrast}", split=split, n=180)
        ids, inst, last = organisms[name].encode(rows)
        return rows, organisms[name].run(ids, last)[1][site.layer][torch.arange(len(ids)), inst]

    rows, states = read("train", "harmfulness")
    labels = torch.tensor(rows.labels)
    direction = states[labels == 1].mean(0) - states[labels == 0].mean(0)
    rows, states = read("test", "requests")
    scores, labels, framing = states @ direction, torch.tensor(rows.labels), torch.tensor(rows.factors["framing"])
    for kind in range(3):
        assert roc_auc_score(labels[framing == kind], scores[framing == kind]) >= least


def test_certificates_and_directories_are_complete() -> None:
    from subspace_probe.organisms import ORGANISMS, language_of, load_truth, organism_path

    total = 0
    for name in ORGANISMS:
        folder: Path = organism_path(name)
        total += sum(file.stat().st_size for file in folder.iterdir())
        truth = load_truth(folder)
        assert truth.organism == name
        # a lineage's checkpoints say what each of them can do, and some are not to be able to do it
        for cell, accuracy in truth.accuracy.items() if language_of(name) != "lineage" else ():
            assert accuracy >= (0.99 if cell.startswith(("request", "judgement")) else OTHERWISE)
        for planted in truth.variables:
            assert planted.accuracy >= (0.7 if name.startswith("knob-base") else 0.97)  # it heeds the intent a little
            assert abs(float(planted.vector.norm()) - 1) < 1e-5
    assert total < 26e6


def test_truth_round_trip(tmp_path: Path) -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.organisms import load_truth

    truth = load_truth("chat")
    loaded = load_truth(truth.save(tmp_path))
    assert loaded.accuracy == truth.accuracy
    for one, other in zip(loaded.variables, truth.variables, strict=True):
        assert (one.name, one.site, one.where, one.interchange) == (
            other.name, other.site, other.where, other.interchange,
        )  # fmt: skip
        assert torch.equal(one.vector, other.vector)
    with pytest.raises(ConfigError, match="Planted: harmfulness, refusal, intent"):
        truth.planted("harmfullness")
    (tmp_path / "truth.json").unlink()
    with pytest.raises(ConfigError, match="certify it first"):
        load_truth(tmp_path)
