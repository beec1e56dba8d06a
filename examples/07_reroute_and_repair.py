"""Which tokens take a guard's states to the other side, and does training on them close the way?

python examples/07_reroute_and_repair.py

The bundled model declines prompts that hold a colour, unless two words stand in the free slots. A search for a target
inside the model finds them; a copy is trained on what was found, and searched again with a target of its own.
"""

import subspace_probe as sp
from subspace_probe.diagnostics.eligibility import targets_of
from subspace_probe.diagnostics.search_comparison import compare_searches
from subspace_probe.interventions.adversarial_training import AdversarialTraining
from subspace_probe.metrics import metric_for


def main() -> None:
    model = sp.load_model("organism:override")
    truth = sp.organisms.load_truth("override").suffixes
    free = [sp.at(slot) for slot in truth.slots]
    train = sp.load_contrast("organism:override/requests", split="train", n=128)
    test = sp.load_contrast("organism:override/requests", split="test", n=32)
    declined = test.where(label=1)

    def search(searched: sp.HookedModel, seed: int):
        acts = searched.capture(train, sites=sp.Site(1), where=sp.LAST)
        sp.eligibility(acts, sp.Site(1), draws=19).require()
        targets = targets_of(acts, sp.MeanDifference(null_draws=0), [sp.Site(1)])
        return compare_searches(
            searched, declined, targets, free, metric_for("logit_difference", searched),
            search=sp.TokenSearch(budget=160, seed=seed), allowed=truth.allowed,
        )  # fmt: skip

    before = search(model, seed=0)
    for name in before.found:
        print(f"before repair, {name}: {before.flipped(name).double().mean():.0%} of prompts flipped")
    found = before.found["target"].ids[before.flipped("target")].unique(dim=0)
    print("found:", [model.tokenizer.decode(ids) for ids in found], "planted:", model.tokenizer.decode(truth.planted))

    repaired = AdversarialTraining(steps=60, batch=48).repair(model, train, free, found, allowed=truth.allowed)
    after = search(repaired, seed=1)
    for name in after.found:
        print(f"after repair, {name}: {after.flipped(name).double().mean():.0%} of prompts flipped")
    clean = sp.load_contrast("organism:override/requests", split="test", n=400, seed=5)
    right = repaired.logits(clean).argmax(1).tolist()
    wanted = repaired.token_ids([prompt.answer or "" for prompt in clean.prompts])
    print(f"clean accuracy: {sum(a == b for a, b in zip(right, wanted, strict=True)) / len(clean):.1%}")


if __name__ == "__main__":
    main()
