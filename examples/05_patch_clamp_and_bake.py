"""Where does a variable sit, does one direction carry it, and can it be set? From a sweep to a changed checkpoint.

python examples/05_patch_clamp_and_bake.py

In the bundled model an intent word says whether to follow the note or the memory. Every state of the pairs is
exchanged, one at a time; then one direction at the place that counts; then its coordinate is set, whatever the word.
"""

import tempfile
from pathlib import Path

import subspace_probe as sp


def main() -> None:
    model = sp.load_model("organism:chat")
    truth = sp.organisms.load_truth("chat").planted("intent")
    train = sp.load_contrast("organism:chat/knob", split="train", n=96)
    test = sp.load_contrast("organism:chat/knob", split="test", n=32)

    clean, corrupt = test.sides()
    sweep = sp.patch_sweep(model, clean, corrupt, "logit_difference", positions=[sp.T_INST, sp.T_POST_INST])
    for layer, effects in zip(sweep.layers, sweep.effect[0].tolist(), strict=True):
        print(f"resid_pre {layer}: " + ", ".join(f"{p} {e:.0%}" for p, e in zip(sweep.positions, effects, strict=True)))
    gradients = sp.attribution(model, clean, corrupt, "logit_difference", positions=[sp.T_INST, sp.T_POST_INST])
    print(f"{gradients.values.shape[1:-1].numel()} cells in one backward pass, as an estimate of the same")

    knob = sp.MeanDifference().fit(model.capture(train, sites=truth.site, where=truth.where), truth.site)
    for subspace in (None, knob):
        report = sp.measure_patch(model, test, truth.site, where=truth.where, subspace=subspace)
        print(f"{'one direction' if subspace else 'whole state'}: {report.findings[-1].note}")

    low, high = (float((knob.origin + s * 0.5 * knob.vector) @ knob.unit) for s in (-1, 1))
    clamp = sp.KnobClamp(knob, where=truth.where, values={"memory": low, "note": high})
    for intent in ("memory", "note"):
        texts = model.generate(test.prompts[:2], interventions=[clamp.to(intent)], max_new_tokens=4)
        print(f"clamped to {intent}: {texts}")

    with tempfile.TemporaryDirectory() as folder:
        path = sp.save_interventions(Path(folder) / "clamp.json", clamp)
        (again,) = sp.load_interventions(path)
        baked = sp.orthogonalize_weights(model, knob)
        off = baked.logits(test) - model.logits(test, interventions=[sp.Ablate(knob)])
        print(f"{path.name} holds {again!r}")
        print(f"ablated in the weights or at run time: logits differ by at most {off.abs().max():.1e}")


if __name__ == "__main__":
    main()
