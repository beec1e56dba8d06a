"""What each finder recovers of the variables planted in the organism: figures that are stated, and then held.

Estimators of the class difference point along the planted vector. Readers (LDA, probe) do not claim to: they whiten and
are held to reading the variable on prompts they were not fitted on. DAS may find an equivalent direction; its figure is
in test_das.py.
"""

from functools import cache
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CONTRASTS = {
    "refusal": ("requests", "refused"),
    "harmfulness": ("requests", None),
    "intent": ("knob", None),
}
# finder -> settings, |cosine| with the planted vector per variable (measured: the least is asserted with slack .02)
FIGURES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "mean_difference": ({}, {"refusal": 0.99, "harmfulness": 0.99, "intent": 0.90}),
    "pca": ({"centre": "pairs"}, {"refusal": 0.98, "harmfulness": 0.99, "intent": 0.90}),
    "factors": ({}, {"refusal": 0.99, "harmfulness": 0.99, "intent": 0.90}),
    "leace": ({}, {"refusal": 0.98, "harmfulness": 0.99, "intent": 0.90}),
}
READERS = ("lda", "linear_probe")


@cache
def organism() -> tuple[Any, Any]:
    import subspace_probe as sp

    return sp.load_model("organism:chat"), sp.organisms.load_truth("chat")


@cache
def captured(variable: str, split: str) -> tuple[Any, Any]:
    import subspace_probe as sp

    model, truth = organism()
    planted = truth.planted(variable)
    name, factor = CONTRASTS[variable]
    contrast = sp.load_contrast(f"organism:chat/{name}", split=split, n=384)
    if factor:
        contrast = contrast.relabel(factor)
    return planted, model.capture(contrast, sites=planted.site, where=planted.where)


def settings(name: str, variable: str) -> dict[str, Any]:
    """In requests, harmfulness and refusal go together: what is not asked for is held fixed where a finder can."""
    given = dict(FIGURES.get(name, ({}, {}))[0])
    if variable == "refusal" and name == "mean_difference":
        given["strata"] = "label"
    if name == "factors":
        given["factors"] = {"refusal": ("label",), "harmfulness": ("refused",), "intent": ()}[variable]
    return given


@pytest.mark.parametrize("variable", CONTRASTS)
@pytest.mark.parametrize("name", FIGURES)
def test_recovers_the_planted_variable_to_its_figure(name: str, variable: str) -> None:
    from subspace_probe.finders import FINDERS

    planted, acts = captured(variable, "train")
    found = FINDERS.load(name)(**settings(name, variable)).fit(acts, planted.site)
    assert found.found
    assert float(found.unit @ planted.vector) > FIGURES[name][1][variable] - 0.02


@pytest.mark.parametrize("variable", CONTRASTS)
@pytest.mark.parametrize("name", READERS)
def test_readers_read_it_on_other_prompts(name: str, variable: str) -> None:
    from subspace_probe.finders import FINDERS
    from subspace_probe.linalg.ranking import auroc

    planted, acts = captured(variable, "train")
    reader = FINDERS.load(name)(null_draws=0).fit(acts, planted.site)
    _, test = captured(variable, "test")
    assert auroc(reader.coords(test.at(planted.site))[:, 0], test.labels) > 0.99
    # a control at the same time: reading well is not pointing along
    if name == "lda" and variable != "intent":
        assert float(reader.unit @ planted.vector) < 0.5


@pytest.mark.parametrize("name", [*FIGURES, *READERS])
def test_is_unchanged_by_the_backend(name: str) -> None:
    import subspace_probe as sp
    from subspace_probe.finders import FINDERS

    planted, acts = captured("intent", "train")
    other = captured_with("nnsight", planted)
    finder = FINDERS.load(name)(**{**settings(name, "intent"), "null_draws": 0})
    a, b = finder.fit(acts, planted.site), finder.fit(other, planted.site)
    assert abs(float(a.unit @ b.unit)) > 1 - 1e-4
    assert sp.linalg.overlap(a.basis, b.basis) > 1 - 1e-4


@cache
def captured_with(backend: str, planted: Any) -> Any:
    import subspace_probe as sp

    contrast = sp.load_contrast("organism:chat/knob", split="train", n=384)
    model = sp.load_model("organism:chat", backend=backend)
    return model.capture(contrast, sites=planted.site, where=planted.where)
