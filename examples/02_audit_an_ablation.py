"""Ask of an intervention whether its effect is real: ablate refusal in the bundled chat model, and audit it.

python examples/02_audit_an_ablation.py [REPORT.html]

Each check answers one question: would a random direction do the same, or one found under shuffled labels? Is the
direction found again on other prompts? Does anything else change? A check that cannot run says why.
"""

import sys

import subspace_probe as sp


def main(page: str = "") -> None:
    model = sp.load_model("organism:chat")
    # 2 x 2: requests are harmful or not, and refused or not. Refusal is contrasted within each kind of request.
    train = sp.load_contrast("organism:chat/requests", split="train", n=384).relabel("refused")
    harmful = sp.load_contrast("organism:chat/requests", split="test", n=240).where(label=1, framing=0)
    others = sp.load_contrast("organism:chat/skills", split="test", n=128)

    finder = sp.MeanDifference(strata="label")
    acts = model.capture(train, sites=sp.resid_post(), where=sp.T_POST_INST)
    refusal = finder.fit(acts, sp.Site(2))
    ablate = sp.Ablate(refusal)  # from everything that writes to the stream, at every token and step

    for prompt, before, after in zip(
        harmful.prompts[:3],
        model.generate(harmful.prompts[:3], max_new_tokens=10),
        model.generate(harmful.prompts[:3], interventions=[ablate], max_new_tokens=10),
        strict=True,
    ):
        print(f"{prompt.shown}\n   as it is: {before}\n    ablated: {after}")

    report = sp.measure(model, ablate, harmful, "refusal_score")
    report += sp.audit(model, ablate, harmful, "refusal_score", refit=(finder, acts), neutral=others, pairs=16)
    print()
    for row in report.tables["questions"].records():
        print(f"{row['verdict']:>12}  {row['question']}\n{'':14}{row['answer']}")
    print()
    print(report)
    if page:
        print("wrote", sp.figures.save_html(report, page))


if __name__ == "__main__":
    main(*sys.argv[1:])
