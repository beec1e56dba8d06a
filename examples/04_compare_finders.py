"""One variable, several finders: what each finds, how alike the results are beside chance, and one for llama.cpp.

python examples/04_compare_finders.py

In the bundled model an intent word says whether to follow the note or the memory. Where it is kept is known, so every
finder can be held against the truth. A reader (LDA) reads best and need not point there; DAS finds what carries the
variable, and has to beat arbitrary labels and an untrained copy of the model.
"""

import tempfile
import warnings
from pathlib import Path

import subspace_probe as sp


def main() -> None:
    model = sp.load_model("organism:chat")
    truth = sp.organisms.load_truth("chat").planted("intent")
    prompts = sp.load_contrast("organism:chat/knob", split="train", n=192)
    acts = model.capture(prompts, sites=truth.site, where=truth.where)

    found = {
        finder.name: finder.fit(acts, truth.site)
        for finder in (sp.MeanDifference(), sp.PCA(centre="pairs"), sp.LEACE(), sp.LDA())
    }
    found["das"] = sp.DAS(steps=60, restarts=1).fit(model, prompts, truth.site, truth.where)
    for name, direction in found.items():
        beside = sp.compare_subspaces(direction, found["mean_difference"], acts)
        print(f"{name:>15}: cosine with the truth {direction.unit @ truth.vector:.2f}; with the first, {beside}")
    for what in ("accuracy", "control_labels", "control_weights"):
        print(f"DAS, {what}: {found['das'].notes[what]['estimate']:.2f}")

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a control vector acts at every token, this direction was read at one
        path = sp.export_gguf(found["mean_difference"], Path(folder) / "intent.gguf", n_layers=model.spec.n_layers)
        print(f"{path.name}: {path.stat().st_size} bytes, valid for llama.cpp: {sp.verify_gguf(path).ok}")


if __name__ == "__main__":
    main()
