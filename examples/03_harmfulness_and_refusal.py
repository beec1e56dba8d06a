"""Separate what a model believes of a request from what it does about it, on the bundled chat model.

python examples/03_harmfulness_and_refusal.py

Harmfulness is read at the end of the instruction, refusal at the end of the prompt (Zhao et al. 2025,
arXiv:2507.11878). Jailbroken requests are harmful but answered, strict ones harmless but refused, so the two can be
told apart. Steering shows which of them each behaviour listens to.
"""

import subspace_probe as sp


def main() -> None:
    model = sp.load_model("organism:chat")
    train = sp.load_contrast("organism:chat/requests", split="train", n=384)
    test = sp.load_contrast("organism:chat/requests", split="test", n=384)
    requests = test.where(label=0, framing=0)
    questions = sp.load_contrast("organism:chat/judgement", split="test", n=384).where(label=0, framing=0)

    # each contrast within the values of the other, so that neither direction can carry both
    at_inst = model.capture(train, sites=sp.resid_post(), where=sp.T_INST)
    at_end = model.capture(train, sites=sp.resid_post(), where=sp.T_POST_INST)
    harmfulness = sp.MeanDifference(strata="refused").fit(at_inst, sp.Site(1))
    refusal = sp.MeanDifference(strata="label").fit(at_end.relabel("refused"), sp.Site(2))
    print(f"cosine, across positions: {harmfulness.cosine(refusal):+.2f}")
    same = sp.MeanDifference(strata="refused").fit(at_end, sp.Site(2))
    print(f"cosine, both at the end:  {same.cosine(refusal):+.2f}   (a cosine across positions alone says little)")

    print(f"\n{'harmless requests':32}{'judged harmful':>16}{'refused':>10}")
    conditions = {
        "as they are": [],
        "steered along harmfulness": [sp.Steer(harmfulness, where=sp.T_INST)],
        "steered along refusal": [sp.Steer(refusal, where=sp.T_POST_INST)],
    }
    for name, edits in conditions.items():
        judged = model.generate(questions, interventions=edits, max_new_tokens=1)
        answered = model.generate(requests, interventions=edits, max_new_tokens=1)
        rates = [texts.count(word) / len(texts) for texts, word in ((judged, "yes"), (answered, "sorry"))]
        print(f"{name:32}{rates[0]:>16.0%}{rates[1]:>10.0%}")
    print("\nThe whole study, with intervals, controls and verdicts: subspace-probe demo")


if __name__ == "__main__":
    main()
