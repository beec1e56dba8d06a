"""The latent probe: scikit-learn's own checks, and each method against a computation that shares no code with it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

if TYPE_CHECKING:
    from subspace_probe.guard.probe import LatentProbe

METHODS = ["centroid_cosine", "mean_difference", "lda", "logistic", "factor"]


def _probe(method: str = "lda", **settings: Any) -> "LatentProbe":
    from subspace_probe.guard.probe import LatentProbe

    return LatentProbe(method, **settings)


def _rows(n: int = 120, d: int = 12, *, gap: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of unequal scale, away from the origin; a third of the rows are positive."""
    generator = np.random.default_rng(seed)
    y = generator.permutation(np.arange(n) % 3 == 0)
    scale = np.geomspace(0.1, 10, d)
    x = generator.standard_normal((n, d)) + gap * y[:, None] * generator.standard_normal(d)
    return x * scale + 2 * scale, y


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---------------------------------------------------------------------------------------------- scikit-learn's checks
@pytest.mark.parametrize("method", METHODS)
def test_it_passes_the_checks_of_scikit_learn(method: str) -> None:
    from sklearn.utils.estimator_checks import check_estimator

    ran = check_estimator(_probe(method), on_skip=None)  # raises at the first that fails
    assert sum(check["status"] == "passed" for check in ran) >= 40
    assert [check["check_name"] for check in ran if check["status"] == "skipped"] in ([], ["check_array_api_input"])
    assert not _probe(method).__sklearn_tags__().classifier_tags.multi_class


def test_those_checks_can_fail() -> None:
    from sklearn.utils.estimator_checks import check_estimator

    from subspace_probe.guard.probe import LatentProbe

    class Inverted(LatentProbe):
        def predict(self, X: object) -> np.ndarray:
            return self.classes_[(self.decision_function(X) < 0).astype(int)]

    with pytest.raises(AssertionError):
        check_estimator(Inverted("mean_difference"), on_skip=None)


# -------------------------------------------------------------------------------------------------- centroid_cosine
def _naive_cosines(x: np.ndarray, low: np.ndarray, high: np.ndarray, n_layers: int) -> np.ndarray:
    width, out = x.shape[1] // n_layers, []
    for row in x:
        total = 0.0
        for layer in range(n_layers):
            block = slice(layer * width, (layer + 1) * width)
            for sign, centre in ((1, high[block]), (-1, low[block])):
                lengths = sum(v * v for v in row[block]) ** 0.5 * sum(v * v for v in centre) ** 0.5
                total += sign * sum(a * b for a, b in zip(row[block], centre, strict=True)) / lengths
        out.append(total / n_layers)
    return np.array(out)


def test_centroid_cosine_is_that_of_a_loop() -> None:
    x, y = _rows(40, 12)
    fresh, _ = _rows(30, 12, seed=1)
    probe = _probe("centroid_cosine", n_layers=3).fit(x, y)
    low, high = x[~y].mean(axis=0), x[y].mean(axis=0)
    found = probe.decision_function(fresh)
    assert np.allclose(found, _naive_cosines(fresh, low, high, 3), atol=1e-12)
    assert (probe.predict(fresh) == (found > 0)).all()
    assert probe.centroids_.shape == (2, 3, 4)
    # control: one layer of all columns is another score
    assert not np.allclose(found, _probe("centroid_cosine").fit(x, y).decision_function(fresh), atol=1e-3)


def test_two_cosines_are_not_the_cosine_to_the_difference() -> None:
    """Far from the origin the latter flags everything at threshold 0."""
    y = np.arange(200) % 2 == 1
    x = np.where(y[:, None], [12.0, 8.0], [10.0, 5.0]) + 0.2 * np.random.default_rng(0).standard_normal((200, 2))
    assert _probe("centroid_cosine").fit(x, y).score(x, y) > 0.99
    assert (x @ (x[y].mean(axis=0) - x[~y].mean(axis=0)) > 0).all()


def test_centroids_are_of_refused_positives_and_accepted_negatives() -> None:
    x, y = _rows()
    refused = np.where(np.arange(len(y)) % 5 == 0, ~y, y).astype(float)  # the model errs on every fifth
    found = _probe("centroid_cosine").fit(x, y, nuisance=refused).centroids_[:, 0]
    assert np.allclose(found, [x[~y & (refused == 0)].mean(axis=0), x[y & (refused == 1)].mean(axis=0)])
    assert not np.allclose(found, _probe("centroid_cosine").fit(x, y).centroids_[:, 0], rtol=1e-3)
    with pytest.raises(ValueError, match="every refused positive row, and there is none"):
        _probe("centroid_cosine").fit(x, y, nuisance=np.zeros(len(y)))
    with pytest.raises(ValueError, match="every not refused negative row"):
        _probe("centroid_cosine").fit(x, y, nuisance=np.ones(len(y)))
    with pytest.raises(ValueError, match=r"refused \(1\) or not \(0\); it was given 0.5"):
        _probe("centroid_cosine").fit(x, y, nuisance=refused / 2)


def test_a_zero_vector_has_no_cosine() -> None:
    x, y = _rows()
    probe = _probe("centroid_cosine", n_layers=2).fit(x, y)
    assert probe.decision_function(np.zeros((1, 12))) == 0
    assert not probe.predict(np.zeros((1, 12)))  # on the boundary is not beyond it
    half = np.concatenate([np.zeros(6), x[0, 6:]])[None]  # a dead layer adds nothing, and the other counts in full
    low, high = probe.centroids_[:, 1]
    other = [x[0, 6:] @ c / np.linalg.norm(x[0, 6:]) / np.linalg.norm(c) for c in (low, high)]
    assert np.isclose(probe.decision_function(half)[0], (other[1] - other[0]) / 2, atol=1e-12)
    x[:, :6] = 0  # nor has a centroid of zeros
    assert np.isfinite(_probe("centroid_cosine", n_layers=2).fit(x, y).predict_proba(x)).all()


# -------------------------------------------------------------------------------------------------- mean_difference
def test_mean_difference_is_the_closed_form() -> None:
    x, y = _rows()
    probe = _probe("mean_difference").fit(x, y)
    low, high = x[~y].mean(axis=0), x[y].mean(axis=0)
    expected = (x - (low + high) / 2) @ (high - low)
    assert np.allclose(probe.decision_function(x), expected, rtol=1e-10, atol=1e-9)
    pooled = np.concatenate([part - part.mean() for part in (expected[y], expected[~y])])
    slope = (expected[y].mean() - expected[~y].mean()) / (pooled @ pooled / (len(y) - 2))
    assert np.isclose(probe.slope_, slope, rtol=1e-10)
    assert np.allclose(probe.predict_proba(x)[:, 1], 1 / (1 + np.exp(-slope * expected)), atol=1e-12)


def test_probabilities_are_those_of_two_normal_classes() -> None:
    """Spherical classes of standard deviation s: the log-odds are gap . (x - midpoint) / s^2."""
    generator, s, gap = np.random.default_rng(0), 3.0, np.array([2.0, -1.0, 0.5])
    y = np.arange(20_000) % 2 == 1
    x = 5 + s * generator.standard_normal((len(y), 3)) + y[:, None] * gap
    fresh = 5 + s * generator.standard_normal((500, 3))
    true = (fresh - 5 - gap / 2) @ gap / s**2
    probe = _probe("mean_difference").fit(x, y)
    assert np.abs(probe.slope_ * probe.decision_function(fresh) - true).max() < 0.15
    assert np.abs(probe.decision_function(fresh) - true).max() > 1  # control: the decision alone is no log-odds


def test_slope_is_finite_and_never_negative() -> None:
    from subspace_probe.guard.methods.rules import normal_slope

    y = np.array([False, False, True, True])
    assert normal_slope(np.array([1.0, 1.0, -1.0, -1.0]), y) == 0
    assert normal_slope(np.zeros(4), y) == 0
    assert np.isclose(normal_slope(np.array([-1.0, -1.0, 1.0, 1.0]), y), 2 / 0.002**2)
    assert np.isclose(normal_slope(np.array([-2.0, 0.0, 0.0, 2.0]), y), 2 / (4 / 2))


# --------------------------------------------------------------------------------------------------- lda and logistic
@pytest.mark.parametrize("shape", [(120, 12), (30, 60)])  # more rows than features; fewer, solved in the rows' span
@pytest.mark.parametrize("shrinkage", ["auto", 0.3, 0.0, None])
def test_lda_is_that_of_scikit_learn(shape: tuple[int, int], shrinkage: float | str | None) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = _rows(*shape)
    x[:, 3] = 1.0  # a constant feature
    fresh, _ = _rows(*shape, seed=1)
    probe = _probe("lda", shrinkage=shrinkage).fit(x, y)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    assert _relative(probe.decision_function(fresh), model.decision_function(fresh)) < 1e-9
    assert np.allclose(probe.predict_proba(fresh), model.predict_proba(fresh), atol=1e-9)
    assert _relative(probe.coef_, model.coef_) < 1e-9
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5).fit(x, y)
    assert _relative(probe.coef_, other.coef_) > 1e-2  # control


def test_ledoit_wolf_from_products_of_rows() -> None:
    from sklearn.covariance import ledoit_wolf_shrinkage

    from subspace_probe.guard.methods.lda import _ledoit_wolf

    for n, d in ((5, 200), (40, 41), (2, 3)):
        x = np.random.default_rng(n).standard_normal((n, d)) * np.geomspace(1, 30, d)
        centred = x - x.mean(axis=0)
        assert np.isclose(_ledoit_wolf(centred @ centred.T / n, d), ledoit_wolf_shrinkage(x), atol=1e-12)


@pytest.mark.parametrize("shape", [(120, 12), (30, 60)])
def test_logistic_is_that_of_scikit_learn(shape: tuple[int, int]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = _rows(*shape)
    x[:, 3] = 1.0
    fresh, _ = _rows(*shape, seed=1)
    probe = _probe("logistic", C=0.7).fit(x, y)
    solver = LogisticRegression(C=0.7, solver="newton-cg", tol=1e-10, max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), solver).fit(x, y)
    fresh[:, 3] = 1.0
    assert _relative(probe.decision_function(fresh), pipeline.decision_function(fresh)) < 1e-3
    assert np.allclose(probe.predict_proba(fresh), pipeline.predict_proba(fresh), atol=1e-3)
    assert probe.coef_[0, 3] == 0
    raw = LogisticRegression(C=0.7, solver="newton-cg", tol=1e-10, max_iter=1000).fit(x, y)
    assert _relative(probe.decision_function(fresh), raw.decision_function(fresh)) > 1e-2  # control: not standardised


@pytest.mark.parametrize("shape", [(120, 12), (30, 60)])
def test_units_make_no_difference(shape: tuple[int, int]) -> None:
    """Log-odds of lda and logistic do not see the unit or origin of a feature; a mean difference sees one for all."""
    x, y = _rows(*shape)
    generator = np.random.default_rng(1)
    scale, shift = generator.uniform(0.2, 5, shape[1]), generator.standard_normal(shape[1])
    for method in ("lda", "logistic"):
        a, b = (_probe(method).fit(rows, y).decision_function(rows) for rows in (x, x * scale + shift))
        assert _relative(a, b) < 1e-3, method
    for method in ("mean_difference", "factor"):
        a, b, c = (_probe(method).fit(rows, y).predict_proba(rows) for rows in (x, 3 * x + shift, x * scale))
        assert np.allclose(a, b, atol=1e-9)
        assert not np.allclose(a, c, atol=1e-3)
    layers = np.repeat([0.5, 7.0], shape[1] // 2)  # cosines: any unit a layer, but an origin of their own
    a, b, c = (
        _probe("centroid_cosine", n_layers=2).fit(rows, y).decision_function(rows) for rows in (x, x * layers, x + 9)
    )
    assert np.allclose(a, b, atol=1e-12)
    assert not np.allclose(a, c, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- factor
def _confounded(n: int, agree: float, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Harmfulness and a stronger refusal along two directions at 60 degrees, which agree in a share of the rows."""
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 1
    refused = np.where(generator.random(n) < agree, y, ~y).astype(float)
    harm, refusal = np.eye(10)[0], 0.5 * np.eye(10)[0] + 3**0.5 / 2 * np.eye(10)[1]
    x = generator.standard_normal((n, 10)) + 3 * y[:, None] * harm + 8 * refused[:, None] * refusal
    return x, y, refused


def _effect_of(nuisance: np.ndarray, y: np.ndarray, decision: np.ndarray) -> float:
    """On the mean decision at fixed y, in units of the effect of y."""
    design = np.stack([np.ones(len(y)), y, nuisance], axis=1)
    _, of_y, of_nuisance = np.linalg.lstsq(design, decision, rcond=None)[0]
    return float(of_nuisance / of_y)


def test_factor_is_least_squares_less_the_nuisance() -> None:
    x, y, refused = _confounded(400, 0.8, seed=0)
    probe = _probe("factor").fit(x, y, nuisance=refused)
    design = np.stack([np.ones(len(y)), y, refused], axis=1)
    _, effect, other = np.linalg.lstsq(design, x, rcond=None)[0]
    expected = effect - effect @ other / (other @ other) * other
    assert np.allclose(probe.coef_[0], expected, rtol=1e-9, atol=1e-10)
    middle = (x[y].mean(axis=0) + x[~y].mean(axis=0)) / 2
    assert np.isclose(probe.intercept_[0], -expected @ middle, rtol=1e-9)
    assert abs(_effect_of(refused, y, probe.decision_function(x))) < 1e-12
    assert abs(_effect_of(refused, y, (x - middle) @ effect)) > 0.5  # control: the coefficient of y alone


def test_factor_reads_harmfulness_where_the_mean_difference_reads_refusal() -> None:
    x, y, refused = _confounded(2000, 0.9, seed=0)
    new, truth, answer = _confounded(2000, 0.1, seed=1)  # jailbreaks, and refusals without need
    factor = _probe("factor").fit(x, y, nuisance=refused).decision_function(new)
    confounded = _probe("mean_difference").fit(x, y).decision_function(new)
    assert roc_auc_score(truth, factor) > 0.93
    assert roc_auc_score(truth, confounded) < 0.2  # control: it goes by the answer, against the truth
    assert roc_auc_score(answer, confounded) > 0.95
    assert abs(_effect_of(answer, truth, factor)) < 0.1


def test_factor_without_a_nuisance_is_the_mean_difference() -> None:
    x, y = _rows()
    a, b = _probe("factor").fit(x, y), _probe("mean_difference").fit(x, y)
    assert (a.coef_ == b.coef_).all()
    assert (a.predict_proba(x) == b.predict_proba(x)).all()


def test_factor_says_when_the_two_cannot_be_told_apart() -> None:
    x, y = _rows()
    for nuisance in (y.astype(float), 3 - 2.0 * y, np.full(len(y), 7.0)):
        with pytest.raises(ValueError, match="constant or follows from them"):
            _probe("factor").fit(x, y, nuisance=nuisance)
    disagree = np.where(np.arange(len(y)) % 5 == 0, ~y, y).astype(float)
    with pytest.raises(ValueError, match="along one direction of 1 features"):
        _probe("factor").fit(x[:, :1], y, nuisance=disagree)
    assert _probe("factor").fit(x, y, nuisance=disagree).score(x, y) > 0.5


# ------------------------------------------------------------------------------------------------- what goes in and out
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [[0, 1], ["benign", "harmful, or so"], [False, True], [-1.0, 2.0]])
def test_saved_is_loaded_exactly(method: str, labels: list[Any]) -> None:
    from safetensors.numpy import load, save

    from subspace_probe.guard.probe import LatentProbe

    x, y = _rows()
    probe = _probe(method, n_layers=2).fit(x, np.array(labels)[y.astype(int)])
    settings = json.loads(json.dumps(probe.get_params()))
    again = LatentProbe.from_tensors(settings, load(save(probe.tensors())))
    assert again.get_params() == probe.get_params()
    assert again.n_features_in_ == 12
    assert again.classes_.dtype == probe.classes_.dtype
    for call in ("predict", "predict_proba", "decision_function"):
        assert (getattr(again, call)(x) == getattr(probe, call)(x)).all()
    other = _probe(method, n_layers=2).fit(x[::2], y[::2])  # control
    assert not (again.decision_function(x) == other.decision_function(x)).all()
    with pytest.raises(ValueError, match="features"):
        again.predict(x[:, :6])


@pytest.mark.parametrize("method", METHODS)
def test_odd_but_lawful_data(method: str) -> None:
    x, y = _rows(24, 6)
    cases = {
        "constant features": np.where(np.arange(6) < 3, 2.0, x),
        "all constant": np.ones((24, 6)),
        "zero rows": np.where(np.arange(24)[:, None] < 12, 0.0, x),
        "more features than rows": np.tile(x, 10),
        "one feature": x[:, 3:4],
        "small integers": np.round(x).astype(np.int8),
        "float32": x.astype(np.float32),
    }
    for name, rows in cases.items():
        for labels in (y, y.astype(int), np.where(y, "b", "a")):
            probe = _probe(method).fit(rows, labels)
            proba = probe.predict_proba(rows)
            assert np.isfinite(proba).all(), name
            assert np.allclose(proba.sum(axis=1), 1, atol=1e-15)
            assert probe.decision_function(rows).dtype == np.float64
            assert set(probe.predict(rows)) <= set(labels)
    # the smallest there is: two rows, and four
    assert np.isfinite(_probe(method).fit(x[[0, 0, 5, 5]], [0, 0, 1, 1]).predict_proba(x)).all()
    if method == "lda":
        with pytest.raises(ValueError, match="two rows of each class; one class has 1"):
            _probe(method).fit(x[:3], [0, 1, 1])
    else:
        assert (_probe(method).fit(x[:2], [0, 1]).predict(x[:2]) == [0, 1]).all()


@pytest.mark.parametrize("method", ["mean_difference", "lda", "logistic"])
def test_others_refuse_a_nuisance(method: str) -> None:
    x, y = _rows()
    with pytest.raises(ValueError, match=f"{method} was given a nuisance.*centroid_cosine, factor"):
        _probe(method).fit(x, y, nuisance=y.astype(float))


def test_errors_say_what_to_do() -> None:
    from subspace_probe.core.errors import ConfigError, DataError, ShapeError, UnknownName

    x, y = _rows()
    with pytest.raises(UnknownName, match="Did you mean 'logistic'"):
        _probe("logistics").fit(x, y)
    with pytest.raises(DataError, match="one class only"):
        _probe().fit(x, np.zeros(len(y)))
    with pytest.raises(DataError, match="Only binary classification"):
        _probe().fit(x, np.arange(len(y)) % 3)
    with pytest.raises(ShapeError, match="5 layers of equal width, and given 12"):
        _probe("centroid_cosine", n_layers=5).fit(x, y)
    with pytest.raises(ConfigError, match="n_layers=0"):
        _probe("centroid_cosine", n_layers=0).fit(x, y)
    for shrinkage in ("ledoit", -0.1, 1.5):
        with pytest.raises(ConfigError, match="lda was given shrinkage"):
            _probe(shrinkage=shrinkage).fit(x, y)
    for nuisance in (np.ones(5), np.ones((len(y), 2))):
        with pytest.raises(ShapeError, match="one number a row"):
            _probe("factor").fit(x, y, nuisance=nuisance)
    with pytest.raises(ValueError, match="NaN"):
        _probe("factor").fit(x, y, nuisance=np.full(len(y), np.nan))
    with pytest.raises(AttributeError, match="no coef_"):
        _ = _probe("centroid_cosine").fit(x, y).coef_
    with pytest.raises(AttributeError, match="no centroids_"):
        _ = _probe().fit(x, y).centroids_
