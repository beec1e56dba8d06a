"""One contrast in three parts that share nothing."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.guard.parts import Parts


@pytest.fixture
def contrast() -> "Contrast":
    """200 prompts in pairs and groups; a tenth of the texts occur twice, in other groups and other letters."""
    from subspace_probe.core.contrasts import Contrast
    from subspace_probe.core.prompts import Prompt

    texts = [f"text {row}" if row % 10 else f"Text  {row % 100}" for row in range(200)]
    labels, pairs = tuple(row % 2 for row in range(200)), tuple(row // 2 for row in range(200))
    return Contrast("c", tuple(map(Prompt, texts)), labels, pairs, tuple(row // 4 for row in range(200)))


def keys(part: "Contrast | None") -> set[str]:
    from subspace_probe.guard.examples import examples_of

    return set() if part is None else set(examples_of(part).keys())


def made(contrast: "Contrast", fit: float, calibrate: float, threshold: float, seed: int = 0) -> "Parts":
    from subspace_probe.guard.parts import parts_of

    return parts_of(contrast, fit=fit, calibrate=calibrate, threshold=threshold, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_parts_share_no_group_and_no_text(contrast: "Contrast", seed: int) -> None:
    parts = made(contrast, 0.5, 0.2, 0.3, seed)
    held = [part for part in (parts.fit, parts.calibrate, parts.threshold) if part is not None]
    assert sum(map(len, held)) == 200
    assert [len(part) for part in held] == pytest.approx([100, 40, 60], abs=12)
    for one in held:
        for other in held:
            if one is not other:
                assert not keys(one) & keys(other)
                assert not set(one.groups) & set(other.groups)
                assert not set(one.pairs) & set(other.pairs)
        assert abs(sum(one.labels) / len(one) - 0.5) < 0.05
    # the control: a split by group alone would put one text on two sides
    first, second = contrast.split(0.5, seed=seed)
    assert keys(first) & keys(second)


def test_a_use_without_need_gets_none(contrast: "Contrast") -> None:
    assert made(contrast, 0.5, 0.0, 0.0).calibrate is None
    assert len(made(contrast, 0.5, 0.0, 0.0).fit) == 200
    only = made(contrast, 0.5, 0.0, 0.5)
    assert only.calibrate is None
    assert only.threshold is not None
    both = made(contrast, 0.5, 0.5, 0.0)
    assert both.threshold is None
    assert both.calibrate is not None


@pytest.mark.parametrize("shares", [(0.0, 0.5, 0.5), (0.5, -0.1, 0.6), (float("nan"), 0.5, 0.5)])
def test_shares_that_cannot_be(contrast: "Contrast", shares: tuple[float, float, float]) -> None:
    from subspace_probe.core.errors import ConfigError

    with pytest.raises(ConfigError, match="Shares of"):
        made(contrast, *shares)
