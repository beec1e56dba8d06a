"""Find a direction on a contrast of your own, then steer with it: questions about capitals (1) and about dishes (0).

python examples/01_find_and_steer.py [MODEL]

The bundled model knows two facts about each country. Its state at the end of a question says which of them was asked
for: adding the direction makes it answer the other, which a random direction does not.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import subspace_probe as sp
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.finders.sweep import find

COUNTRIES = """avela borun cadmia delvar elora farun galdor hestia iboria jaruna kelmar lorvia mirana nordal ostria
pelago quenta rovana seluna tarvos ulmera vandor wexia yoruna""".split()
CAPITAL = ("what is the capital of {} ?", "name the capital of {}")
DISH = ("which dish is loved in {} ?", "name the dish of {}")


def my_contrast() -> sp.Contrast:
    """One JSON object a line; `pair` and `group` keep what belongs together on one side of a split."""
    rows = [
        {"prompt": wording.format(country), "label": label, "pair": f"{country} {number}", "group": country}
        for country in COUNTRIES
        for label, wordings in ((1, CAPITAL), (0, DISH))
        for number, wording in enumerate(wordings)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return sp.Contrast.from_jsonl(path)


def main(name: str = "organism:chat") -> None:
    model, contrast = sp.load_model(name), my_contrast()
    acts = model.capture(contrast, sites=sp.resid_post(), where=sp.T_POST_INST)
    direction = find(acts, sp.MeanDifference()).subspace  # picks the layer on validation prompts
    print(f"{direction}: test AUROC {direction.notes['test_auroc']:.3f}, p = {direction.notes['p_of_the_best']:.2g}")

    capitals, dishes = contrast.where(label=1), contrast.where(label=0)
    wanted, usual = (model.generate(part, max_new_tokens=1) for part in (capitals, dishes))
    asked = [replace(p, answer=a, foil=f) for p, a, f in zip(dishes.prompts, wanted, usual, strict=True)]
    dishes = replace(dishes, prompts=tuple(asked))
    steer = sp.Steer(direction, where=sp.T_POST_INST)
    control = steer.with_subspace(random_like(direction, seed=0))
    for label, edits in (("as it is", []), ("steered", [steer]), ("random", [control])):
        print(f"{label:>9}:", model.generate(dishes.prompts[:3], interventions=edits, max_new_tokens=2))
    report = sp.measure(model, steer, dishes, "logit_difference")
    report += sp.audit(model, steer, dishes, "logit_difference", refit=(sp.MeanDifference(), acts))
    print(report)


if __name__ == "__main__":
    main(*sys.argv[1:])
