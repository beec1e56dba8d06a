"""Run by test_folder.py in a process of its own: captures that are killed, in children that share one loaded model.

Usage: killed_captures.py FOLDER KILLS. Prints, as JSON, the number of whole shards after each kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from subspace_probe.models import capturing, load_model
from subspace_probe.store import Folder
from tests.models.tiny import text, tiny, words

PROMPTS = [text(3 + i % 9, seed=i) for i in range(120)]


def prepare() -> None:
    torch.set_num_threads(1)
    capturing.PART_BYTES = 1024  # a shard every few prompts


def capture(folder: Path, pause: float) -> None:
    model = load_model(tiny("gpt2"), tokenizer=words())
    run = model.backend.run

    def slow(*args, **kwargs):
        time.sleep(pause)
        return run(*args, **kwargs)

    model.backend.run = slow
    model.capture(PROMPTS, where="all", batch_tokens=16, into=Folder(folder))


def whole_shards(folder: Path) -> list[Path]:
    return list(folder.glob("shard-*.safetensors"))


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    prepare()
    load_model(tiny("gpt2"), tokenizer=words())
    moments, whole = random.Random(0), []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            capture(folder, pause=0.02)
            os._exit(0)
        # by what is there, not by the clock: a busy machine would not have begun
        wanted = len(whole_shards(folder)) + moments.randint(1, 3)
        while len(whole_shards(folder)) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the capture ended before it was killed"
        whole.append(len(whole_shards(folder)))
    capture(folder, pause=0.0)
    json.dump(whole, sys.stdout)


if __name__ == "__main__":
    main()
