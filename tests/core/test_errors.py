"""Every exception: its builtin parent, its public name, and a message that says what to do."""

import pytest

PARENTS = {
    "SiteError": LookupError,
    "UnsupportedSite": NotImplementedError,
    "ShapeError": ValueError,
    "RankError": ValueError,
    "ConfigError": ValueError,
    "UnknownName": KeyError,
    "DataError": ValueError,
    "BackendError": RuntimeError,
    "PositionError": ValueError,
    "StoreError": OSError,
    "StaleStore": OSError,
    "MissingExtra": ImportError,
}


@pytest.mark.parametrize("name", PARENTS)
def test_errors_are_ours_and_a_builtins(name: str) -> None:
    from subspace_probe.core import errors

    kind = getattr(errors, name)
    assert issubclass(kind, errors.SubspaceProbeError)
    assert issubclass(kind, PARENTS[name])
    assert kind.__module__ == "subspace_probe"
    assert str(kind("one sentence")) == "one sentence"  # KeyError would print it in quotes


def test_every_error_is_in_the_table() -> None:
    import collections.abc

    from subspace_probe.core import errors

    ours = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == "subspace_probe"
    }
    warnings = {"IllusionWarning", "OffManifoldWarning", "SmallSampleWarning"}
    assert ours == {*PARENTS, "SubspaceProbeError", *warnings}
    assert all(issubclass(getattr(errors, name), UserWarning) for name in warnings)
    assert collections.abc.Iterable.__module__ == "collections.abc"  # imported there, and not ours to rename


def test_an_unknown_name_comes_with_the_nearest_and_the_list() -> None:
    from subspace_probe.core.errors import unknown

    names = ["mean_difference", "leace", "das"]
    assert str(unknown("finder", "mean_diference", names)) == (
        "Unknown finder 'mean_diference'. Did you mean 'mean_difference'? Known: das, leace, mean_difference."
    )
    assert str(unknown("finder", "zzz", names)) == "Unknown finder 'zzz'. Known: das, leace, mean_difference."
    assert str(unknown("finder", "x", [])) == "Unknown finder 'x'. Known: none."
