"""The operating point of a guard on its curve."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subspace_probe.core.reports import Report


def test_the_threshold_lies_where_the_table_says(only: "Callable[..., Report]") -> None:
    from subspace_probe.core.reports import Table
    from subspace_probe.figures import draw

    row = {"value": 1.5, "fpr": 0.0, "recall": 0.8, "bound": 0.02, "fpr_low": 0.0, "fpr_high": 0.03}
    held = Table.of([row | {"recall_low": 0.7, "recall_high": 0.9}])
    figure = draw(only("operating", threshold=held))["operating"]
    (mark,) = [trace for trace in figure.data if trace.name == "the threshold on these prompts"]
    assert mark.y == (0.8,)
    curve = next(trace for trace in figure.data if trace.name == "guard")
    assert mark.x[0] == min(curve.x) > 0  # a rate of none is drawn at the left end of the logarithmic axis
    assert figure.layout.xaxis.ticktext[0] == "0"
    (promise,) = [note for note in figure.layout.annotations if "0.02" in note.text]
    assert promise.x == math.log10(0.02)
    without = draw(only("operating"))["operating"]
    assert not [trace for trace in without.data if trace.name == "the threshold on these prompts"]
