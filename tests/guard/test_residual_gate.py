"""The residual gate against scikit-learn's PCA, and its alarm rate on benign states it has not seen."""

import json
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

if TYPE_CHECKING:
    from subspace_probe.guard.residual_gate import ResidualGate


def _gate(*values: Any, **settings: Any) -> "ResidualGate":
    from subspace_probe.guard.residual_gate import ResidualGate

    return ResidualGate(*values, **settings)


def _benign(n: int, d: int, generator: np.random.Generator) -> np.ndarray:
    """Four strong directions, the same for every d, and noise."""
    frame = np.linalg.qr(np.random.default_rng(99).standard_normal((d, 4)))[0]
    return 5 + generator.standard_normal((n, 4)) * [20, 18, 16, 14] @ frame.T + generator.standard_normal((n, d))


def test_it_passes_the_checks_of_scikit_learn() -> None:
    from sklearn.utils.estimator_checks import check_estimator

    ran = check_estimator(_gate(), on_skip=None)
    assert sum(check["status"] == "passed" for check in ran) >= 40
    assert "check_outliers_train" in {check["check_name"] for check in ran}


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 90)])
def test_residuals_and_limit_are_those_of_a_principal_component_analysis(n: int, d: int) -> None:
    from sklearn.model_selection import KFold

    def residual(rest: np.ndarray, rows: np.ndarray) -> np.ndarray:
        pca = PCA(n_components=0.95, svd_solver="full").fit(rest)
        return np.linalg.norm(rows - pca.inverse_transform(pca.transform(rows)), axis=1)

    generator = np.random.default_rng(0)
    x, fresh = _benign(n, d, generator), _benign(50, d, generator)
    gate = _gate(0.95, alarm_rate=0.1, random_state=3).fit(x)
    assert np.allclose(-gate.score_samples(fresh), residual(x, fresh), rtol=1e-9)
    assert len(gate.components_) == PCA(n_components=0.95, svd_solver="full").fit(x).n_components_
    held_out = np.concatenate(
        [residual(x[rest], x[out]) for rest, out in KFold(10, shuffle=True, random_state=3).split(x)]
    )
    assert np.isclose(gate.limit_, sorted(held_out)[ceil((n + 1) * 0.9) - 1], rtol=1e-9)
    assert (gate.predict(fresh) == np.where(-gate.score_samples(fresh) <= gate.limit_, 1, -1)).all()
    # controls: more components, other folds
    assert not np.allclose(-_gate(0.99).fit(x).score_samples(fresh), residual(x, fresh), rtol=1e-3)
    assert gate.limit_ != _gate(0.95, alarm_rate=0.1, random_state=4).fit(x).limit_


@pytest.mark.parametrize(("n", "d", "alarm_rate", "small"), [(400, 12, 0.05, False), (100, 80, 0.1, True)])
def test_alarm_rate_on_benign_states_not_seen(n: int, d: int, alarm_rate: float, small: bool) -> None:
    """Over independent fits, within three standard errors; a limit from the fitted rows fails where they are few."""
    generator, rates, naive = np.random.default_rng(0), [], []
    for draw in range(24):
        x, fresh = _benign(n, d, generator), _benign(2000, d, generator)
        gate = _gate(0.9, alarm_rate=alarm_rate, random_state=draw).fit(x)
        rates.append((gate.predict(fresh) == -1).mean())
        limit = np.sort(-gate.score_samples(x))[ceil((n + 1) * (1 - alarm_rate)) - 1]
        naive.append((-gate.score_samples(fresh) > limit).mean())
    error = np.std(rates, ddof=1) / len(rates) ** 0.5
    assert abs(np.mean(rates) - gate.alarm_rate_) < 3 * error
    assert abs(gate.alarm_rate_ - alarm_rate) < 1 / n
    if small:
        assert np.mean(naive) > 2 * alarm_rate


def test_it_sees_states_off_the_benign_span() -> None:
    generator = np.random.default_rng(0)
    x, fresh = _benign(500, 30, generator), _benign(500, 30, generator)
    gate = _gate(0.95).fit(x)
    frame = np.linalg.svd(x - x.mean(axis=0))[2]
    assert len(gate.components_) == 4
    assert (gate.predict(fresh + 15 * frame[-1]) == -1).mean() > 0.99
    assert (gate.predict(fresh + 15 * frame[0]) == -1).mean() < 0.05  # control: as far, inside the span
    assert (gate.predict(fresh) == -1).mean() < 0.05


def test_saved_is_loaded_exactly() -> None:
    from safetensors.numpy import load, save

    from subspace_probe.guard.residual_gate import ResidualGate

    x = _benign(60, 10, np.random.default_rng(0))
    gate = _gate(0.9, alarm_rate=0.05, random_state=5).fit(x)
    again = ResidualGate.from_tensors(json.loads(json.dumps(gate.get_params())), load(save(gate.tensors())))
    assert again.get_params() == gate.get_params()
    assert (again.alarm_rate_, again.offset_, again.n_features_in_) == (gate.alarm_rate_, gate.offset_, 10)
    assert (again.decision_function(x) == gate.decision_function(x)).all()
    assert not (again.decision_function(x) == _gate(0.9).fit(x[::2]).decision_function(x)).all()  # control


def test_at_the_limit_is_inside() -> None:
    from subspace_probe.guard.residual_gate import ResidualGate

    tensors = {
        "mean": np.zeros(2),
        "components": np.eye(2)[:1],
        "limit": np.array([2.0]),
        "alarm_rate": np.array([0.1]),
    }
    gate = ResidualGate.from_tensors({}, tensors)
    assert gate.predict([[7.0, 2.0], [0.0, -2.0], [0.0, 2.5]]).tolist() == [1, 1, -1]


def test_odd_but_lawful_data() -> None:
    generator = np.random.default_rng(0)
    few = _gate().fit(_benign(20, 10, generator))
    assert few.alarm_rate_ == 1 / 21  # too few rows for one in a hundred, and it says so
    assert _gate().fit(_benign(200, 10, generator)).alarm_rate_ <= 0.01
    flat = generator.standard_normal((50, 2)) @ generator.standard_normal((2, 6)) + 1e3
    gate = _gate(1.0).fit(flat)  # nothing is left over but rounding
    assert len(gate.components_) <= 5
    assert (gate.predict(flat) == 1).all()
    assert (gate.predict(flat + generator.standard_normal(6)) == -1).all()
    same = _gate().fit(np.ones((5, 4)))
    assert same.predict(np.array([[1.0, 1, 1, 1], [1, 1, 1, 2]])).tolist() == [1, -1]
    line = _gate().fit(generator.standard_normal((200, 1)))  # one feature: the distance to the mean
    assert line.predict([[0.0], [9.0]]).tolist() == [1, -1]
    assert np.isfinite(_gate().fit(flat[:2]).score_samples(flat)).all()


def test_settings_outside_their_range() -> None:
    from subspace_probe.core.errors import ConfigError

    for settings in ({"variance": 0.0}, {"variance": 1.1}, {"alarm_rate": 0.0}, {"alarm_rate": 1.0}):
        with pytest.raises(ConfigError, match="ResidualGate was given"):
            _gate(**settings).fit(np.eye(4))


def test_rows_of_one_source_are_left_out_together() -> None:
    """Copies that stay in the components make residuals too small, and the limit with them."""
    from subspace_probe.guard.residual_gate import ResidualGate

    rng = np.random.default_rng(0)
    sources = np.repeat(np.arange(60), 6)
    rows = np.repeat(rng.normal(size=(60, 80)), 6, axis=0) + 0.01 * rng.normal(size=(360, 80))
    fresh = rng.normal(size=(2000, 80))
    alarms = {
        name: float((ResidualGate(alarm_rate=0.1).fit(rows, groups=groups).predict(fresh) < 0).mean())
        for name, groups in {"sources": sources, "rows": None}.items()
    }
    assert alarms["sources"] < 0.2
    assert alarms["rows"] > 0.5
