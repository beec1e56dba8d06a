"""The data of an audit's figures, gathered from the checks that ran."""

from collections.abc import Mapping

from torch import Tensor

from subspace_probe.core.reports import Table
from subspace_probe.diagnostics.cases import Case


def tables_of(case: Case, values: Mapping[str, Tensor]) -> dict[str, Table]:
    """Tables for the figures that this audit has data for."""
    return {}
