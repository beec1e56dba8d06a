"""Whether a guard holds on a source of prompts that it has never seen: refitted without it, measured on it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.errors import ConfigError, DataError, unknown
from subspace_probe.core.findings import Finding
from subspace_probe.guard.measured import Measured
from subspace_probe.guard.nulls import Nulls
from subspace_probe.guard.ranked import AUROC, Ranked

MARGIN = 0.05
NONE = float("nan")


def held_out_findings(
    measured: Measured, train: Contrast, states: Float64[np.ndarray, "t f"], source: str, nulls: Nulls
) -> list[Finding]:
    """AUROC on the test prompts of each source, of the probe fitted to the training prompts of all others.

    The layer stays the guard's, which was chosen with all sources.

    Args:
        states: of the training prompts, at the guard's sites.
        source: a factor of both the training and the test prompts.

    Raises:
        UnknownName: no such factor.
    """
    for factors in (train.factors, measured.factors):
        if source not in factors:
            raise unknown("factor", source, factors)
    of_train, y = np.asarray(train.factors[source]), np.asarray(train.labels)
    found: list[Finding] = []
    for value in np.unique(measured.factors[source]):
        mask, kept = measured.factors[source] == value, of_train != value
        name, n = f"auroc.held_out_source.{value}", int(mask.sum())
        claim = f"fitted without the prompts of {source} = {value}, the guard tells the classes apart there"
        reason = _missing(measured.y[mask], y[kept])
        if reason:
            found.append(Finding(name, claim, NONE, n=n, verdict="not tested", note=reason))
            continue
        try:
            probe = measured.guard.refitted(states[kept], y[kept], train.take(np.flatnonzero(kept).tolist()))
        except (ConfigError, DataError) as error:
            found.append(Finding(name, claim, NONE, n=n, verdict="not tested", note=str(error)))
            continue
        ranked = Ranked(probe.decision_function(measured.rows[mask]), measured.prompts.where(mask))
        null = nulls.range(AUROC, measured.prompts, mask)
        left = int((~kept).sum())
        note = (
            f"{left} training prompts of this source left out" if left else "the source is not in the training prompts"
        )
        finding = Finding(name, claim, ranked.value(AUROC), ranked.interval(AUROC), null, n, note=note)
        found.append(finding.judged("above", margin=MARGIN, no_effect=0.5))
    return found


def _missing(test: Sequence[bool] | np.ndarray, train: np.ndarray) -> str:
    """Why it cannot be measured; empty where it can."""
    if len(set(np.asarray(test).tolist())) < 2:
        return "the test prompts of this source are of one class only"
    if min(np.bincount(train, minlength=2)) < 2:
        return "the training prompts of the other sources are of one class only"
    return ""
