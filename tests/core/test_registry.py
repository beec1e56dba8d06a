"""Lazy tables: nothing is imported before it is used, and unknown names get help."""

from importlib.metadata import EntryPoint

import pytest


def test_an_entry_is_imported_on_use() -> None:
    from subspace_probe.core.registry import Registry

    table = Registry("thing", {"fraction": "fractions:Fraction", "broken": "no_such_module:X"})
    assert table.names() == list(table) == ["fraction", "broken"]
    assert "fraction" in table
    assert "fractoin" not in table
    from fractions import Fraction

    assert table.load("fraction") is Fraction
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        table.load("broken")


def test_unknown_names_get_the_nearest_match() -> None:
    from subspace_probe.core.errors import UnknownName
    from subspace_probe.models import BACKENDS

    with pytest.raises(UnknownName, match=r"Unknown backend 'nativ'\. Did you mean 'native'\? Known: native"):
        BACKENDS.load("nativ")


def test_other_packages_add_names_but_take_none_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.core import registry

    points = [EntryPoint("own", "json:dumps", "g"), EntryPoint("theirs", "json:loads", "g")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "test.group" else [])
    table = registry.Registry("thing", {"own": "fractions:Fraction"}, group="test.group")
    assert table.names() == ["own", "theirs"]
    import fractions
    import json

    assert table.load("own") is fractions.Fraction
    assert table.load("theirs") is json.loads
    registry._third_party.cache_clear()
