"""What an audit costs, as a multiple of the measurement it is about: check by check, and with `budget="quick"`.

    PYTHONPATH=.bench python -m tests.benchmarks.audit [--all]

On a model of GPT-2 small's shape with random weights. `--all` runs every check too, which takes a while.
"""

import argparse
import time
from collections.abc import Callable

import torch

import subspace_probe as sp
from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.prompts import Prompt
from tests.benchmarks.subjects import gpt2_small, words

N, TOKENS = 64, 16


def pairs(seed: int) -> Contrast:
    """Minimal pairs of random words that differ in the middle one."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randint(2, 5000, (N, TOKENS), generator=draw)
    prompts: list[Prompt] = []
    for label in (0, 1):
        for row in base.clone():
            row[TOKENS // 2] = 100 + label
            prompts.append(Prompt(text=" ".join(f"w{i}" for i in row.tolist()), answer="w17", foil="w18"))
    index = tuple(range(N)) * 2
    return Contrast("random words", tuple(prompts), (0,) * N + (1,) * N, index, index)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = sp.load_model(gpt2_small(), tokenizer=words())
    both, test = pairs(0), pairs(1)
    site = sp.Site(6)
    acts = model.capture(both, sites=site, where=sp.LAST)
    finder = sp.MeanDifference(null_draws=0)
    steer = sp.Steer(finder.fit(acts, site), where=sp.LAST)
    asked = test.where(label=0)
    common = {"refit": (finder, acts), "natural": test, "neutral": test.where(label=1)}
    ratios: list[float] = []
    for _ in range(options.rounds):
        alone = seconds(lambda: sp.measure(model, steer, asked, "logit_difference"))
        quick = seconds(lambda: sp.audit(model, steer, asked, "logit_difference", budget="quick", **common))
        ratios.append(quick / alone)
    print(f"measurement {alone:.2f} s; quick audit {sorted(ratios)[len(ratios) // 2]:.1f} times as long {ratios}")
    report = sp.audit(
        model, steer, asked, "logit_difference", budget=None if options.all else "quick", progress=True, **common
    )
    for row in report.tables["cost"].records():
        times = row["seconds"] / alone
        print(f"{row['check']:20} {row['times the measurement']:8} estimated {times:8.2f} measured  {row['left out']}")


if __name__ == "__main__":
    main()
