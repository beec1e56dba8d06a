"""Every exception and warning of the package.

One root, `SubspaceProbeError`, and a builtin as second parent, so that code that already catches `ValueError` or
`LookupError` keeps working. A message has three parts: what was asked, what was found, what to do.
"""

import difflib
from collections.abc import Iterable


class SubspaceProbeError(Exception):
    """Root of everything this package raises on purpose."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument; a message is meant to be read.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class SiteError(SubspaceProbeError, LookupError):
    """A site that does not exist in this model, or that never fired."""


class UnsupportedSite(SiteError, NotImplementedError):
    """A site that exists in other families but not in this one, with the reason."""


class ShapeError(SubspaceProbeError, ValueError):
    """A tensor of the wrong shape, or with non-finite values."""


class RankError(ShapeError):
    """A subspace of the wrong rank for the operation."""


class ConfigError(SubspaceProbeError, ValueError):
    """A setting that cannot be honoured."""


class UnknownName(ConfigError, KeyError):
    """A name that is in no table. The message carries the nearest match and the full list."""


class DataError(SubspaceProbeError, ValueError):
    """Prompts or labels that cannot be used; names the file and the line."""


class BackendError(SubspaceProbeError, RuntimeError):
    """The model could not be loaded or run."""


class PositionError(SubspaceProbeError, ValueError):
    """A position that a prompt does not have, such as an instruction span in a prompt without a chat template."""


class StoreError(SubspaceProbeError, OSError):
    """A file that cannot be read or written."""


class StaleStore(StoreError):
    """An artifact made for another model, or from other data; says which part differs."""


class MissingExtra(SubspaceProbeError, ImportError):
    """An optional package that is not installed; prints the exact pip line."""


class IllusionWarning(UserWarning):
    """A check found a reason to doubt that a subspace is what the model uses."""


class OffManifoldWarning(UserWarning):
    """An edit moves activations far outside the data."""


class SmallSampleWarning(UserWarning):
    """Too few prompts for the statistic asked for."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Build an `UnknownName` that offers the nearest match and lists what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


for _error in list(globals().values()):
    # only our own: what is imported here is a type as well, and is not ours to rename
    if isinstance(_error, type) and _error.__module__ == __name__:
        _error.__module__ = "subspace_probe"  # tracebacks show the public name
