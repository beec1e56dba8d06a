"""`--set key=value` against a dataclass of settings: unknown names and wrong types are errors, not surprises."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from subspace_probe.core.errors import ConfigError, unknown

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_settings(settings: type, given: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Values for the fields of a dataclass, from what was typed.

    Args:
        settings: a dataclass.
        given: field name to text.
        kind: what the settings are of, for errors: "setting of mean_difference".

    Raises:
        UnknownName: a name that is no field, with the nearest one.
        ConfigError: every text that is not of its field's type, all at once.
    """
    names = [field.name for field in fields(settings) if field.init]
    hints = get_type_hints(settings)
    found: dict[str, Any] = {}
    problems: list[str] = []
    for name, text in given.items():
        if name not in names:
            raise unknown(kind, name, names)
        try:
            found[name] = _value(hints[name], text.strip())
        except ValueError:
            problems.append(f"--set {name}={text}: {_wanted(hints[name])} was expected.")
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def describe_settings(settings: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and documentation of every field, for a table."""
    hints, documented = get_type_hints(settings), _field_docs(settings)
    rows: list[tuple[str, str, str, str]] = []
    for field in fields(settings):
        if not field.init:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown = "required" if default is MISSING else str(default).replace("\n", "\\n")
        takes = _wanted(hints[field.name]).removeprefix("a ").replace(", or several with commas", ",...")
        rows.append((field.name, takes, shown, documented.get(field.name, "")))
    return rows


def _value(hint: Any, text: str) -> Any:
    """The text as a value of a type; ValueError where it is none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if NoneType in args and text.lower() in ("none", "null", ""):
            return None
        return _first([arg for arg in args if arg is not NoneType], text)
    if origin is Literal:
        return next(value for value in args if str(value) == text) if text in map(str, args) else _fail()
    if origin in (tuple, list):
        parts = [part.strip() for part in text.split(",")] if text else []
        if origin is list or args[-1] is Ellipsis:
            return origin(_value(args[0], part) for part in parts)
        if len(parts) != len(args):
            return _fail()
        return tuple(_value(arg, part) for arg, part in zip(args, parts, strict=True))
    if hint is bool:
        lower = text.lower()
        return lower in TRUE if lower in TRUE + FALSE else _fail()
    return hint(text) if hint in (int, float, str, Path) else _fail()


def _first(hints: list[Any], text: str) -> Any:
    """The first type that takes the text; texts last, because they take anything."""
    for hint in sorted(hints, key=lambda hint: hint is str):
        try:
            return _value(hint, text)
        except ValueError:
            continue
    return _fail()


def _fail() -> Any:
    raise ValueError


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("none" if arg is NoneType else _wanted(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (tuple, list):
        return f"{_wanted(args[0])}, or several with commas"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}, which the command line cannot give")


def _field_docs(settings: type) -> dict[str, str]:
    """The string under each field, or its line in the docstring's Args."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef)), [])
    found: dict[str, str] = {}
    for node, below in pairwise(body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
