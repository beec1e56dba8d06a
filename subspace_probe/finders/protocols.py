"""What a finder is that needs the model itself, and not only its activations."""

from typing import ClassVar, Protocol, runtime_checkable

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.sites import Site
from subspace_probe.core.subspaces import Subspace
from subspace_probe.core.tokens import Where
from subspace_probe.models.hooked import HookedModel


@runtime_checkable
class ModelFinder(Protocol):
    """From a model and prompts to a subspace. Frozen settings; `fit` returns the result."""

    name: ClassVar[str]

    def fit(
        self, model: HookedModel, contrast: Contrast, site: Site, where: Where, *, progress: bool = False
    ) -> Subspace: ...
