"""Explicit lazy tables: a name, and the class that carries it, imported on use."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, final

from subspace_probe.core.errors import unknown


@final
@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing.

    Args:
        kind: what its entries are, for errors: "finder".
        table: name to "module:Attribute", in the order they are shown.
        group: entry-point group through which other packages add to it.
    """

    kind: str
    table: Mapping[str, str]
    group: str = ""

    def names(self) -> list[str]:
        """Every name, the package's own first."""
        return list(self._all())

    def load(self, name: str) -> Any:
        """Import and return the entry.

        Raises:
            UnknownName: with the nearest match and the list.
        """
        table = self._all()
        if name not in table:
            raise unknown(self.kind, name, table)
        module, attribute = table[name].split(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def _all(self) -> Mapping[str, str]:
        # the package's own names come first, and no other package can take one over
        return {**self.table, **{k: v for k, v in _third_party(self.group).items() if k not in self.table}}


@cache
def _third_party(group: str) -> Mapping[str, str]:
    return {point.name: point.value for point in entry_points(group=group)} if group else {}
