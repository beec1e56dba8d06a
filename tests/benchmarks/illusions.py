"""How often the audit's line on mechanism is right: on subspaces whose label is known by construction.

    PYTHONPATH=.bench python -m tests.benchmarks.illusions --out DIR [--limit 8] [--calibration]

Margins were set with `--calibration`, on other organisms than those reported without it. Writes a report (JSON and
HTML) with one row a subspace, the rates with Clopper-Pearson intervals, and which check found what.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

import subspace_probe as sp
from subspace_probe.core.findings import Expectation, Finding, Interval
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.diagnostics.random_controls import random_like
from subspace_probe.linalg.resampling import clopper_pearson
from subspace_probe.organisms.illusions import LabelledSubspace, faithful_cases, illusory_cases, inflated_cases
from subspace_probe.organisms.unused import unused_cases

CHECKS = ("exchange", "containment", "reader_split", "dormancy", "clamp", "readable", "elsewhere")
WANTED = {
    "illusory": ("refuted", Expectation(above=0.9)),
    "faithful": ("refuted", Expectation(below=0.05)),
    "inflated": ("supported", None),
    "unused": ("refuted", Expectation(above=0.9)),
    "random": ("supported", Expectation(below=0.0)),
}
"""Of each label: the verdict that is counted, and how often it should come out."""


def row_of(case: LabelledSubspace, label: str, pairs: int) -> dict[str, object]:
    """The verdicts on one subspace: exchanged between held-out pairs, as a patch."""
    positive, negative = case.pairs.first_pairs(pairs).sides()
    source = sp.Source.of(case.model.capture(positive, sites=case.site, where=case.where))
    patch = sp.Patch(source, case.where, case.subspace)
    natural = case.pairs.first_pairs(pairs)
    report = sp.audit(case.model, patch, negative, case.metric, natural=natural, checks=CHECKS, pairs=pairs)
    row: dict[str, object] = {"case": case.name, "label": label, "kind": case.kind}
    for name in ("mechanism", *(f"mechanism.{check}" for check in CHECKS)):
        finding = report.finding(name)
        row[name.rpartition(".")[2]] = finding.verdict
        row[f"{name.rpartition('.')[2]} value"] = round(finding.estimate, 3)
    return row


def randoms(cases: Sequence[LabelledSubspace], n: int) -> Iterator[LabelledSubspace]:
    """Random directions, as many in each of these places."""
    from dataclasses import replace

    for seed in range(n):
        case = cases[seed % len(cases)]
        fake = random_like(case.subspace, seed=seed)
        yield replace(case, subspace=fake, name=f"{case.name}: random {seed}", kind="random")


def findings_of(rows: Sequence[dict[str, object]]) -> list[Finding]:
    """How often each label got the verdict that is counted."""
    found: list[Finding] = []
    for label, (verdict, expected) in WANTED.items():
        own = [row for row in rows if row["label"] == label]
        if not own:
            continue
        hits = sum(row["mechanism"] == verdict for row in own)
        rate, low, high = clopper_pearson(hits, len(own))
        interval = Interval(low, high, of=f"{len(own)} subspaces, Clopper-Pearson")
        name = f"{label}.{verdict}"
        note = f"{hits} of {len(own)} {label} subspaces come out {verdict}"
        found.append(Finding(name, note, rate, interval, None, len(own), "supported", expected=expected, note=note))
    return found


def caught(rows: Sequence[dict[str, object]]) -> Table:
    """Which check found what: the share of each kind that each check refutes."""
    kinds = dict.fromkeys((row["label"], row["kind"]) for row in rows)
    records: list[dict[str, object]] = []
    for label, kind in kinds:
        own = [row for row in rows if (row["label"], row["kind"]) == (label, kind)]
        record: dict[str, object] = {"label": label, "kind": kind, "n": len(own)}
        for check in ("mechanism", *CHECKS[:5]):
            record[check] = round(sum(row[check] == "refuted" for row in own) / len(own), 2)
        record["supported"] = round(sum(row["mechanism"] == "supported" for row in own) / len(own), 2)
        records.append(record)
    return Table.of(records, "share of each kind of subspace that each check refutes, and that comes out supported")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="of each label")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--labels", nargs="*", default=["illusory", "faithful", "inflated", "unused"])
    parser.add_argument("--calibration", action="store_true", help="the organisms that margins were set on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    began, rows, places = time.monotonic(), list[dict[str, object]](), list[LabelledSubspace]()
    builders = {
        "illusory": illusory_cases,
        "faithful": faithful_cases,
        "inflated": inflated_cases,
        "unused": unused_cases,
    }
    for label in options.labels:
        for case in tqdm(builders[label](calibration=options.calibration, limit=options.limit), desc=label):
            if case.label == label:  # those of no use bring positive controls
                rows.append(row_of(case, label, options.pairs))
            if len(places) < 12 and not any(case.site == place.site and case.model is place.model for place in places):
                places.append(case)
    for case in tqdm(randoms(places, options.random), desc="random", total=options.random):
        rows.append(row_of(case, "random", min(16, options.pairs)))
    table, provenance = caught(rows), Provenance.now(model="organisms", data="labelled subspaces", seed=0)
    tables = {"caught": table, "subspaces": Table.of(rows, "one row a subspace")}
    report = Report("illusions", tuple(findings_of(rows)), tables, provenance)
    stem = "illusions-calibration" if options.calibration else "illusions"
    report.save(options.out / f"{stem}.json")
    sp.figures.save_html(report, options.out / f"{stem}.html")
    print(report)
    for record in table.records():
        print("  ".join(f"{name} {value}" for name, value in record.items()))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
