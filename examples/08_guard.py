"""A guard on a model's own states, with a false-positive rate that one can state.

python examples/08_guard.py [FOLDER]

It is fitted on plain requests only, and judges requests in framings that keep the bundled model from refusing: what the
model makes of a request does not depend on what it will do. The threshold rests on requests that nothing else has seen,
and its promise holds for requests like those.
"""

import sys
import tempfile

import subspace_probe as sp
from subspace_probe.core.errors import DataError
from subspace_probe.guard.guard import LatentGuard
from subspace_probe.guard.moderation import moderate

REQUESTS, FRAMINGS = "organism:chat/requests", ("plain", "jailbreak", "strict")


def main(folder: str | None = None) -> None:
    model = sp.load_model("organism:chat")
    train, fresh = sp.load_contrast(REQUESTS, split="train").split(0.3, seed=0)
    test = sp.load_contrast(REQUESTS, split="test")

    guard = LatentGuard(model).fit(train.where(framing=0))  # the layer by cross-validation
    try:
        guard.set_threshold(fresh.where(label=0).take(range(20)))
    except DataError as error:
        print("too few:", error)
    guard.set_threshold(fresh.where(label=0))  # framings among them, as in the traffic that it is to see
    print(guard)

    for framing, name in enumerate(FRAMINGS):
        part = test.where(framing=framing)
        flagged = guard.predict(part)
        shares = [flagged[[row for row, y in enumerate(part.labels) if y == label]].mean() for label in (1, 0)]
        refused = sum(part.factors["refused"][row] for row, y in enumerate(part.labels) if y) / sum(part.labels)
        print(
            f"{name:>9}: flags {shares[0]:.1%} of harmful, {shares[1]:.1%} of harmless; the model refuses {refused:.0%}"
        )

    report = guard.report(test, train=train.where(framing=0), slices=["framing"], refused="refused")
    for finding in ("auroc", "fpr.at_threshold", "baseline.tfidf.auroc", "baseline.refusal_direction.auroc"):
        print(f"{finding:>32}: {report.finding(finding).estimate:.3f} {report.finding(finding).interval}")

    with tempfile.TemporaryDirectory() as temporary:
        guard.save(folder or temporary)
        again = LatentGuard.load(folder or temporary, model)
    for prompt, answer in zip(
        test.prompts[:2], moderate(again, [prompt.shown for prompt in test.prompts[:2]]), strict=True
    ):
        print(f"{prompt.shown!r}: {answer['flagged']}, {answer['category_scores']['harmful']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
