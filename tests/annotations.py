"""Annotated shapes are checked in the first calls of every function in a test, and not in the thousandth.

A null of 199 permutations calls the same functions with the same shapes 199 times, and to check one call of a small
function costs more than the call. jaxtyping asks `__no_type_check__` at every call, so a function can be let through
once it was checked often enough; the next test starts anew.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable

from beartype import beartype

CALLS = 20
"""Calls of one function in one test that are checked."""

_seen: Counter[tuple[str, str]] = Counter()
_let_through: list[Callable[..., object]] = []


def first_calls(check: Callable[..., object]) -> Callable[..., object]:
    """The type checker of `--jaxtyping-packages`: beartype, for the first calls of each function in each test.

    jaxtyping hands over not the function but two stand-ins of its name and signature, one for the arguments and one
    for these and what is returned.
    """
    checked, name = beartype(check), (check.__module__, check.__qualname__)

    @functools.wraps(checked)
    def counted(*args: object, **kwargs: object) -> object:
        _seen[name] += 1
        if _seen[name] == 2 * CALLS:
            function = _function(*name)
            if function is not None:
                function.__no_type_check__ = True
                _let_through.append(function)
        return checked(*args, **kwargs)

    return counted


def start_anew() -> None:
    """Check every function again; called before each test."""
    _seen.clear()
    while _let_through:
        del _let_through.pop().__no_type_check__


def _function(module: str, qualified: str) -> Callable[..., object] | None:
    """The function of that name without its wrappers; None for one that is made inside another, always checked."""
    found: object = sys.modules.get(module)
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part, None)
    found = getattr(found, "__func__", None) or getattr(found, "fget", None) or found
    function = inspect.unwrap(found) if callable(found) else None
    return function if inspect.isfunction(function) else None
