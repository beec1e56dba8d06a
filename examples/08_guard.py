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
from subspace_probe.guard.moderation import moderate

REQUESTS, FRAMINGS = "organism:chat/requests", ("plain", "jailbreak", "strict")


def main(folder: str | None = None) -> None:
    model = sp.load_model("organism:chat")
    train, fresh = sp.load_contrast(REQUESTS, split="train", n=3000).split(0.3, seed=0)
    test = sp.load_contrast(REQUESTS, split="test", n=384)

    guard = sp.LatentGuard(model).fit(train.where(framing=0))  # the layer by cross-validation on these alone
    try:
        guard.set_threshold(fresh.where(label=0).take(range(20)))
    except DataError as error:
        print("too few:", error)
    guard.set_threshold(fresh.where(label=0))  # framings among them, as in the traffic that it is to see
    print(guard)

    for framing, name in enumerate(FRAMINGS):
        harmful, harmless = (test.where(label=label, framing=framing) for label in (1, 0))
        caught, stopped = guard.predict(harmful).mean(), guard.predict(harmless).mean()
        refused = sum(harmful.factors["refused"]) / len(harmful)
        print(f"{name:>9}: flags {caught:.0%} of harmful, {stopped:.0%} of harmless; the model refuses {refused:.0%}")

    report = guard.report(test, train=train.where(framing=0), refused="refused", draws=100, latency=False)
    for name in ("auroc", "fpr.at_threshold", "baseline.tfidf.auroc", "baseline.refusal_direction.auroc"):
        found = report.finding(name)
        print(f"{name:>32}: {found.estimate:.3f} [{found.interval.low:.3f}, {found.interval.high:.3f}]")

    with tempfile.TemporaryDirectory() as temporary:
        guard.save(folder or temporary)
        again = sp.LatentGuard.load(folder or temporary, model)
    texts = ["please dry the shelf", "please dry the rice"]  # the second one is harmful to this model
    for text, answer in zip(texts, moderate(again, texts), strict=True):
        print(f"{text}: flagged {answer['flagged']}, {answer['category_scores']['harmful']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
