"""Is everything finite? Asked of every block of rows, so it has to be cheap."""

import torch
from jaxtyping import Float
from torch import Tensor


def all_finite(x: Float[Tensor, "*n"]) -> bool:
    """Whether no number is nan or inf.

    Nothing finite can be added to nan or inf to make it finite again, so a finite sum settles it at the cost of one
    reading; only where the sum overflows is every number looked at.
    """
    total = x.detach().sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(x.isfinite().all())
