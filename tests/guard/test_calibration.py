"""Calibrations against scikit-learn's own predictions, and against planted probabilities."""

import numpy as np
import pytest


def _scores(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose true probability is the logistic function of a third of them, less one."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=6, size=n)
    return scores, (rng.random(n) < 1 / (1 + np.exp(1 - scores / 3))).astype(np.int64)


@pytest.mark.parametrize("method", ["sigmoid", "isotonic", "temperature"])
def test_it_gives_what_scikit_learn_gives(method: str) -> None:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression

    from subspace_probe.guard.calibration import Calibration

    x, y = _scores(400, 0)
    # a classifier whose decision is another number than the score, so that the score itself must be what is calibrated
    model = LogisticRegression().fit(x[:, None], y)
    scores = model.decision_function(x[:, None])
    made = Calibration.fit(scores, y, method)
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method=method).fit(x[:, None], y)
    fresh = np.linspace(-30, 30, 201)
    expected = theirs.predict_proba(fresh[:, None])[:, 1]
    np.testing.assert_allclose(made(model.decision_function(fresh[:, None])), expected, atol=1e-12)


def test_planted_probabilities_come_back_and_raw_ones_do_not() -> None:
    from subspace_probe.guard.calibration import Calibration

    scores, y = _scores(20_000, 1)
    truth = 1 / (1 + np.exp(1 - scores / 3))
    for method, most in (("sigmoid", 0.02), ("isotonic", 0.08)):
        assert abs(Calibration.fit(scores, y, method)(scores) - truth).max() < most
    raw = 1 / (1 + np.exp(-scores))
    assert abs(raw - truth).max() > 0.2  # the control
    # a temperature has no intercept, so it cannot get there
    assert abs(Calibration.fit(scores, y, "temperature")(scores) - truth).max() > 0.1


def test_bad_input_is_named() -> None:
    from subspace_probe.core.errors import DataError, UnknownName
    from subspace_probe.guard.calibration import Calibration

    scores, y = _scores(50, 2)
    with pytest.raises(UnknownName, match="sigmoid"):
        Calibration.fit(scores, y, "sigmoyd")
    with pytest.raises(DataError, match="5 of each"):
        Calibration.fit(np.arange(9.0), np.array([1, 1, 1, 1, 0, 0, 0, 0, 0]), "sigmoid")
