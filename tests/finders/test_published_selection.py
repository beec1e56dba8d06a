"""The published choice of a refusal direction, on the published tables."""

import json
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "refusal_direction"
MODELS = ("gemma-2b-it", "meta-llama-3-8b-instruct", "qwen-1_8b-chat")


def _rows(folder: Path):
    from subspace_probe.finders.published_selection import Candidate

    rows = json.loads((folder / "direction_evaluations.json").read_text())
    keys = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
    return [Candidate(*(row[key] for key in keys)) for row in rows]


@pytest.mark.parametrize("model", MODELS)
def test_reproduces_the_published_pick_and_the_whole_filtered_order(model: str) -> None:
    from subspace_probe.finders.published_selection import select_published

    folder = PUBLISHED / model
    if not folder.is_dir():
        pytest.skip("the published tables are not in ../shared/data: this check against them needs them")
    rows = _rows(folder)
    n_layers = 1 + max(row.layer for row in rows)
    kept = select_published(rows, n_layers)
    pick = json.loads((folder / "direction_metadata.json").read_text())
    filtered = json.loads((folder / "direction_evaluations_filtered.json").read_text())
    assert (kept[0].position, kept[0].layer) == (pick["pos"], pick["layer"])
    assert [(c.position, c.layer) for c in kept] == [(row["position"], row["layer"]) for row in filtered]
    # control: without the filter on KL the list is another one
    assert len(select_published(rows, n_layers, kl_most=float("inf"))) != len(kept)


def test_drops_nan_cuts_layers_by_the_integer_rule_and_names_an_empty_result() -> None:
    from subspace_probe.core.errors import ConfigError
    from subspace_probe.finders.published_selection import Candidate, select_published

    nan = Candidate(-1, 0, float("nan"), 1.0, 0.0)
    late = Candidate(-1, 14, -9.0, 1.0, 0.0)  # int(18 * 0.8) = 14: already cut
    good = Candidate(-2, 13, -1.0, 0.0, 0.1)  # both bounds are inclusive
    assert select_published([nan, late, good], 18) == (good,)
    with pytest.raises(ConfigError, match="None of 2 candidates survives"):
        select_published([nan, late], 18)
