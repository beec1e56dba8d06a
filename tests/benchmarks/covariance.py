"""Covariance of more rows than fit in memory: `Moments` beside scikit-learn's IncrementalPCA.

Rows of 768 float32 numbers, two of whose coordinates have means of 60 and -25, as residual streams do, are streamed
from disk: from one file, read into a buffer that is used again and again, and from activations as this package stores
them.
Every contestant runs in a process of its own, which says how long it took after its imports and how much memory it
needed. What comes out is compared with a two-pass covariance in float64.

IncrementalPCA takes minutes at a million rows: there its time is ten times that at a tenth of them, unless --full.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks.side_by_side import Contestant, Row, Timed, measure, report, settings

WIDTH, BATCH, KEPT, FACTORS = 768, 4096, 16, 64
Array = np.ndarray[Any, np.dtype[Any]]


def write_rows(path: Path, rows: int) -> None:
    """Rows with a spectrum that falls off slowly, a batch at a time; the first ones are the same whatever `rows`."""
    generator = np.random.default_rng(0)
    loadings = generator.standard_normal((FACTORS, WIDTH), dtype=np.float32)
    loadings *= (np.arange(1, FACTORS + 1, dtype=np.float32) ** -0.7)[:, None]
    means = np.zeros(WIDTH, dtype=np.float32)
    means[[5, 400]] = 60, -25
    with path.open("wb") as file:
        for start in range(0, rows, BATCH):
            count = min(BATCH, rows - start)
            factors = generator.standard_normal((BATCH, FACTORS), dtype=np.float32)[:count]
            noise = generator.standard_normal((BATCH, WIDTH), dtype=np.float32)[:count]
            (factors @ loadings + noise + means).tofile(file)


def read_rows(path: Path, rows: int) -> Iterator[Array]:
    """Batches in one buffer that is used again: a memory map would count the page cache as this process's memory."""
    buffer = np.empty((BATCH, WIDTH), dtype=np.float32)
    with path.open("rb", buffering=0) as file:
        for start in range(0, rows, BATCH):
            part = buffer[: min(BATCH, rows - start)]
            file.readinto(part.data.cast("B"))
            yield part


def write_store(path: Path, rows: int, folder: Path) -> None:
    """The same rows as stored activations: one prompt, one row a token."""
    import torch

    from subspace_probe.core.activations import Activations, MemoryRows
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt
    from subspace_probe.core.sites import Site
    from subspace_probe.core.tokens import ALL
    from subspace_probe.store import save_activations

    values = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(rows, WIDTH)))
    acts = Activations(
        MemoryRows({Site(0): values}),
        Contrast("rows", (Prompt("rows"),), (0,)),
        torch.zeros(rows, dtype=torch.long),
        torch.arange(rows),
        ALL,
        {},
    )
    save_activations(acts, folder)


def top(covariance: Array) -> tuple[Array, Array]:
    """The largest eigenvalues, falling, and their eigenvectors as rows."""
    values, vectors = np.linalg.eigh(covariance)
    return values[::-1][:KEPT], vectors.T[::-1][:KEPT]


def moments_of_file(path: Path, rows: int) -> tuple[Array, Array]:
    """Ours, from the file."""
    import torch

    from subspace_probe.linalg import Moments

    moments = Moments.empty(WIDTH)
    for batch in read_rows(path, rows):
        moments = moments.update(torch.from_numpy(batch))
    return top(moments.covariance().numpy())


def moments_of_store(folder: Path, rows: int) -> tuple[Array, Array]:
    """Ours, from stored activations."""
    from subspace_probe.core.sites import Site
    from subspace_probe.linalg import Moments
    from subspace_probe.store import open_activations

    moments = Moments.empty(WIDTH)
    for batch, _ in open_activations(folder).batches(Site(0), size=BATCH):
        moments = moments.update(batch)
    assert moments.n == rows
    return top(moments.covariance().numpy())


def incremental_pca(path: Path, rows: int) -> tuple[Array, Array]:
    """scikit-learn's, which keeps 16 components and corrects them batch by batch."""
    from sklearn.decomposition import IncrementalPCA

    found = IncrementalPCA(n_components=KEPT, batch_size=BATCH)
    for batch in read_rows(path, rows):
        found.partial_fit(batch)
    return found.explained_variance_, found.components_


def two_pass(path: Path, rows: int) -> tuple[Array, Array]:
    """The reference: float64 throughout, the mean first."""
    mean = sum(batch.sum(0, dtype=np.float64) for batch in read_rows(path, rows)) / rows
    scatter = np.zeros((WIDTH, WIDTH))
    for batch in read_rows(path, rows):
        centred = batch - mean
        scatter += centred.T @ centred
    return top(scatter / (rows - 1))


WORKERS: dict[str, Callable[[Path, int], tuple[Array, Array]]] = {
    "file": moments_of_file,
    "store": moments_of_store,
    "incremental_pca": incremental_pca,
    "two_pass": two_pass,
}


def work(name: str, source: Path, rows: int) -> None:
    """In a process of its own: run one, and print what it took. Imports are warmed up and not counted."""
    import torch  # noqa: F401
    from sklearn.decomposition import IncrementalPCA  # noqa: F401

    from subspace_probe.store import open_activations  # noqa: F401

    before = _peak()
    begin, used = time.perf_counter(), time.process_time()
    values, vectors = WORKERS[name](source, rows)
    took = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - used}
    took["grown"] = _peak() - before
    print(json.dumps(took | {"values": values.tolist(), "vectors": vectors.tolist()}))


def _peak() -> float:
    """Largest memory of this process so far, MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # rusage counts the parent's memory at the time of the fork
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes where it is not Linux


def _spawn(name: str, source: Path, rows: int) -> Timed:
    command = [sys.executable, "-m", "tests.benchmarks.covariance", "--worker", name]
    command += ["--source", str(source), "--rows", str(rows)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return Timed(answer["seconds"], answer["processor"], answer)


def errors(found: dict[str, Any], values: Array, vectors: Array) -> tuple[float, float]:
    """Worst relative error of the eigenvalues, and worst 1 - |cosine| of the eigenvectors."""
    cosines = np.abs((np.array(found["vectors"]) * vectors).sum(1))
    return float(np.abs(np.array(found["values"]) / values - 1).max()), float((1 - cosines).max())


def run(folder: Path, rows: int, *, rounds: int, pca: bool, out: Path) -> list[Row]:
    """All contestants at one number of rows."""
    file, store = folder / "rows.f32", folder / f"store-{rows}"
    write_store(file, rows, store)
    values, vectors = (np.array(_spawn("two_pass", file, rows).output[key]) for key in ("values", "vectors"))
    facts: dict[str, dict[str, float]] = {}

    def one(label: str, name: str, source: Path) -> Contestant:
        def differs(answer: dict[str, Any]) -> float:
            value, vector = errors(answer, values, vectors)
            facts[label] = {"1-cosine": vector, "peak MB above imports": round(answer["grown"])}
            return value

        return Contestant(label, lambda: _spawn(name, source, rows), differs)

    contestants = [one("Moments, from a file", "file", file), one("Moments, from the store", "store", store)]
    contestants += [one("IncrementalPCA, from a file", "incremental_pca", file)] if pca else []
    rows_measured = measure(contestants, rounds=rounds, warm_up=0)
    report(
        f"Covariance of {rows} rows of {WIDTH}, top {KEPT} eigenpairs",
        rows_measured,
        compared="worst relative error of an eigenvalue, from float64 in two passes",
        out=out,
        name=f"covariance_{rows}",
        **facts,
    )
    return rows_measured


def main() -> None:
    """A tenth of the rows with everybody, then all of them."""
    parser = settings(__doc__ or "", rounds=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--full", action="store_true", help="run IncrementalPCA at all rows too")
    parser.add_argument("--worker", choices=sorted(WORKERS), help="used internally")
    parser.add_argument("--source", type=Path, help="used internally")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.source, args.rows)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.f32", args.rows)
        small = run(folder, args.rows // 10, rounds=args.rounds, pca=True, out=args.out)
        large = run(folder, args.rows, rounds=args.rounds, pca=args.full, out=args.out)
    if not args.full:
        slow = 10 * median(small[-1].processor)
        print(
            f"IncrementalPCA at {args.rows} rows, ten times its time at a tenth: {slow:.0f} s of processor time", end=""
        )
        print("".join(f"; {row.name} is {slow / median(row.processor):.1f} times as fast" for row in large))


if __name__ == "__main__":
    main()
