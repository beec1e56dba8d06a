"""One contrast in three parts: to fit on, to calibrate on, and to set a threshold on."""

from dataclasses import dataclass, replace
from typing import final

from subspace_probe.core.contrasts import Contrast, components
from subspace_probe.core.errors import ConfigError
from subspace_probe.guard.examples import examples_of


@final
@dataclass(frozen=True)
class Parts:
    """Prompts for each use; None where a use gets none."""

    fit: Contrast
    calibrate: Contrast | None
    threshold: Contrast | None


def parts_of(contrast: Contrast, *, fit: float, calibrate: float, threshold: float, seed: int) -> Parts:
    """Three parts that share no pair, no group and no text, case and white space aside.

    Args:
        contrast: prompts of both classes.
        fit: share of the prompts to fit on. Shares need not add up to 1; only the first cannot be 0.
        calibrate: share to calibrate on.
        threshold: share whose negatives set the threshold.
        seed: of the draw.

    Raises:
        ConfigError: shares that cannot be, or too few groups for the parts.
    """
    shares = (fit, calibrate, threshold)
    if not fit > 0 or min(shares) < 0:
        raise ConfigError(f"Shares of {shares} were asked for. Each is 0 or more, and the first, to fit on, above 0.")
    texts: dict[str, int] = {}
    keys = examples_of(contrast).keys()
    numbers = [texts.setdefault(key, len(texts)) for key in keys]
    joined = replace(contrast, groups=tuple(components(contrast.groups, numbers)))
    if not calibrate and not threshold:
        return Parts(joined, None, None)
    first, rest = joined.split(fit / sum(shares), seed=seed)
    if not calibrate:
        return Parts(first, None, rest)
    if not threshold:
        return Parts(first, rest, None)
    second, third = rest.split(calibrate / (calibrate + threshold), seed=seed)
    return Parts(first, second, third)
