"""Timings, side by side with other libraries; run by `make bench`, never by pytest, and nothing here asserts a time.

`python -m tests.benchmarks.capture` runs one alone.
"""

import os
import sys
from pathlib import Path

# Read once, when the numerical libraries are first imported. On a shared machine two threads of BLAS that wait for each
# other cost up to 50 times the work; set OMP_NUM_THREADS to use more on a quiet one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Libraries that are compared with but no dependency of ours: last in line, so that they replace nothing of it.
sys.path.append(str(Path(__file__).resolve().parents[2] / ".bench"))
