"""The floors hold: a page of `ast` that reads the floor list drawn in README.md and fails on whatever breaks it.

Each rule is a function from a parsed source tree to a list of complaints, so that a control can feed it a small tree
that breaks exactly that rule and see it complain. Not a style checker: ruff and pyright do that.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "subspace_probe"

# Who may import what: "F2+" is that floor and all above, "figures" a sub-package, "models.lens" one module.
# A library that is not listed may be imported nowhere: adding a dependency is a decision, made here.
FENCES: dict[str, tuple[str, ...]] = {
    "torch": ("F0+",),
    "numpy": ("F0+",),
    "scipy": ("F0+",),
    "jaxtyping": ("F0+",),
    "einops": ("F1+",),
    "safetensors": ("F1+",),
    "tqdm": ("F1+",),
    "transformers": ("F2+",),
    "tokenizers": ("F2+",),
    "huggingface_hub": ("F2+",),
    "accelerate": ("F2+",),
    "filelock": ("store", "guard"),
    "xxhash": ("store",),
    "transformer_lens": ("models.lens",),
    "nnsight": ("models.nns",),
    "sae_lens": ("dictionaries",),
    "datasets": ("data",),
    "sklearn": ("finders", "metrics", "diagnostics", "guard"),
    "plotly": ("figures",),
    "typer": ("cli",),
    "rich": ("cli",),
    "fastapi": ("serve",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "h11": ("serve",),
    "pydantic": ("serve",),
    "prometheus_client": ("serve",),
}
LONGEST = 400
LONG: dict[str, str] = {}  # module -> why it may be longer: pure tables of words only
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


# ------------------------------------------------------------------------------------------------- reading the sources
@dataclass(frozen=True)
class Module:
    """One source file below the package root; `folder` is its sub-package, "" for the root's own files."""

    name: str
    is_package: bool
    text: str

    @property
    def folder(self) -> str:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 or (len(parts) == 2 and self.is_package) else ""

    @property
    def place(self) -> str:
        return self.name.removeprefix(PACKAGE).removeprefix(".") or PACKAGE

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text, self.name))


Tree = Mapping[str, Module]
Floors = Mapping[str, int]


def read_tree(root: Path) -> dict[str, Module]:
    tree = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree[name] = Module(name, is_package, path.read_text(encoding="utf-8"))
    return tree


def read_floors(readme: str) -> tuple[list[str], dict[str, int]]:
    """Labels from the ground up ("F0", "F1", ...) and the level of each sub-package."""
    block = re.search(r"<!-- floors -->\s*```\w*\n(.*?)\n```\s*<!-- /floors -->", readme, re.DOTALL)
    assert block, "README.md has no fenced block between <!-- floors --> and <!-- /floors -->"
    rows = [line.split(maxsplit=1) for line in reversed(block[1].splitlines())]
    levels = {name.strip(): level for level, (_, names) in enumerate(rows) for name in names.split("|")}
    return [label for label, _ in rows], levels


LABELS, FLOORS = read_floors((ROOT / "README.md").read_text(encoding="utf-8"))


def imports(module: Module, tree: Tree) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that is imported, at any depth: a function-local import is an import."""
    for node in module.nodes():
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:  # relative: climb from the package that holds this module
                    above = module.name.split(".")[
                        : None if module.is_package and level == 1 else -(level - module.is_package)
                    ]
                    source = ".".join([*above, *([source] if source else [])])
                for alias in names:
                    inner = f"{source}.{alias.name}"
                    yield node.lineno, inner if inner in tree else str(source)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(target)), *_]
            ):
                if called in {"import_module", "__import__"}:
                    yield node.lineno, target


def strings(module: Module) -> Iterator[tuple[int, str]]:
    """(line, module named) of every "subspace_probe.x.y:Name", the form that registries load on use."""
    for node in module.nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(rf"({PACKAGE}(?:\.\w+)*):\w+", node.value)
            if named:
                yield node.lineno, named[1]


# --------------------------------------------------------------------------------------------------------------- rules
def floors_look_down(tree: Tree) -> list[str]:
    """No import, and no string that stands for one, goes up a floor or across to a sibling."""
    wrong = []
    for module in tree.values():
        own = module.folder
        if not own:  # the root resolves names across floors; nothing else may live beside it
            if module.name not in {PACKAGE, f"{PACKAGE}.__main__"}:
                wrong.append(f"{module.name}: belongs in a sub-package")
            continue
        if own not in FLOORS:
            wrong.append(f"{module.name}: {own} has no floor in README.md")
            continue
        for line, target in [*imports(module, tree), *strings(module)]:
            package, _, rest = target.partition(".")
            other = rest.split(".")[0]
            if package != PACKAGE or other == own:
                continue
            # The root stands above every floor; only the top one (the command line, the server) may use it.
            level = FLOORS.get(other, len(LABELS) - 1.5 if not other else len(LABELS))
            if FLOORS[own] <= level:
                wrong.append(f"{module.name}:{line}: {own} must not import {target}")
    return wrong


def no_cycles(tree: Tree) -> list[str]:
    below = {name: module for name, module in tree.items() if module.folder}
    graph = {name: {t for _, t in imports(module, tree) if t in below} - {name} for name, module in below.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as cycle:
        return ["cycle: " + " <- ".join(cycle.args[1])]
    return []


def registries_stay_home(tree: Tree) -> list[str]:
    """Every string in a sub-package's table names a module in the table's own folder."""
    return [
        f"{module.name}:{line}: {target} is outside {module.folder}"
        for module in tree.values()
        if module.folder and module.is_package
        for line, target in strings(module)
        if not f"{target}.".startswith(f"{PACKAGE}.{module.folder}.")
    ]


def third_parties_keep_their_place(tree: Tree) -> list[str]:
    wrong = []
    for module in (module for module in tree.values() if module.folder in FLOORS):
        for line, target in imports(module, tree):
            library = target.split(".")[0]
            if library == PACKAGE or library in sys.stdlib_module_names:
                continue
            places = FENCES.get(library, ())
            if not any(
                FLOORS[module.folder] >= LABELS.index(place[:-1])
                if place.endswith("+")
                else f"{module.place}.".startswith(f"{place}.")
                for place in places
            ):
                wrong.append(f"{module.name}:{line}: {library} belongs in {' or '.join(places) or 'no place'}")
    return wrong


def files_are_short(tree: Tree) -> list[str]:
    lengths = {module.name: len(module.text.splitlines()) for module in tree.values() if module.name not in LONG}
    return [f"{name}: {length} lines, more than {LONGEST}" for name, length in lengths.items() if length > LONGEST]


def no_drawers(tree: Tree) -> list[str]:
    """A name that says nothing collects everything."""
    return [f"{name}: say what is in it" for name in tree if DRAWERS & {part.strip("_") for part in name.split(".")}]


def annotations_are_real(tree: Tree) -> list[str]:
    """`from __future__ import annotations` turns them into strings, which jaxtyping then silently does not check."""
    return [
        f"{module.name}:{node.lineno}: annotations from __future__"
        for module in tree.values()
        for node in module.nodes()
        if isinstance(node, ast.ImportFrom) and node.module == "__future__" and node.names[0].name == "annotations"
    ]


Rule = Callable[[Tree], list[str]]
RULES: tuple[Rule, ...] = (
    floors_look_down,
    no_cycles,
    registries_stay_home,
    third_parties_keep_their_place,
    files_are_short,
    no_drawers,
    annotations_are_real,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_obeys(rule: Rule) -> None:
    tree = read_tree(ROOT)
    assert tree, "no sources found: every rule would hold of nothing"
    if broken := rule(tree):
        pytest.fail("\n".join(broken), pytrace=False)


# ------------------------------------------------------------------------------------------------------------ controls
# A tree that breaks no rule; then, for each rule, files that break it when added, each with the complaint expected.
SOUND = {
    "__init__.py": "TABLE = 'subspace_probe.models.hooked:load_model'\n",
    "__main__.py": "from subspace_probe.cli.main import main\n",
    "linalg/__init__.py": "import math\n\nimport torch\n",
    "core/__init__.py": "from subspace_probe.core.sites import Site\n",
    "core/sites.py": "from subspace_probe import linalg\nfrom .tokens import Where\n",
    "core/tokens.py": "import einops\n",
    "models/__init__.py": "BACKENDS = {'lens': 'subspace_probe.models.lens:Lens'}\n",
    "models/lens.py": "import transformer_lens\nfrom ..core import sites\n",
    "cli/__init__.py": "",
    "cli/main.py": "import subspace_probe as sp\nimport typer\n",
}
CONTROLS: list[tuple[Rule, str, str, str]] = [
    (floors_look_down, "core/up.py", "import subspace_probe.models.lens\n", "core must not import"),
    (floors_look_down, "core/up.py", "from ..models import lens\n", "core must not import"),
    (floors_look_down, "store/side.py", "from subspace_probe.models import lens\n", "store must not import"),
    (floors_look_down, "core/local.py", "def f():\n    from subspace_probe import models\n", "core must not import"),
    (floors_look_down, "core/typed.py", "if TYPE_CHECKING:\n    import subspace_probe.cli\n", "core must not import"),
    (floors_look_down, "core/string.py", "X = 'subspace_probe.models.lens:Lens'\n", "core must not import"),
    (floors_look_down, "core/call.py", "import_module('subspace_probe.models')\n", "core must not import"),
    (floors_look_down, "studies/root.py", "import subspace_probe as sp\n", "studies must not import subspace_probe"),
    (floors_look_down, "attic/new.py", "", "has no floor"),
    (floors_look_down, "stray.py", "", "belongs in a sub-package"),
    (no_cycles, "core/tokens.py", "from subspace_probe.core.sites import Site\n", "cycle"),
    (no_cycles, "core/tokens.py", "def f():\n    from . import sites\n", "cycle"),
    (registries_stay_home, "finders/__init__.py", "T = {'p': 'subspace_probe.linalg.pca:PCA'}\n", "outside finders"),
    (third_parties_keep_their_place, "linalg/a.py", "import einops\n", "belongs in F1+"),
    (third_parties_keep_their_place, "core/a.py", "from transformers import AutoModel\n", "belongs in F2+"),
    (third_parties_keep_their_place, "models/native.py", "import transformer_lens\n", "belongs in models.lens"),
    (third_parties_keep_their_place, "guard/a.py", "def f():\n    import plotly.express\n", "belongs in figures"),
    (third_parties_keep_their_place, "core/a.py", "import pandas\n", "belongs in no place"),
    (files_are_short, "core/long.py", "x = 1\n" * (LONGEST + 1), "401 lines"),
    (no_drawers, "core/utils.py", "", "say what is in it"),
    (no_drawers, "core/_helpers/__init__.py", "", "say what is in it"),
    (annotations_are_real, "core/a.py", "from __future__ import annotations\n", "annotations from __future__"),
]


def grow(root: Path, files: Mapping[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_tree(root)


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_tree_passes(rule: Rule, tmp_path: Path) -> None:
    assert rule(grow(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), CONTROLS)
def test_a_rule_can_fail(rule: Rule, name: str, text: str, complaint: str, tmp_path: Path) -> None:
    (found,) = rule(grow(tmp_path, SOUND | {name: text}))
    assert complaint in found


def test_every_rule_has_a_control() -> None:
    assert {rule for rule, *_ in CONTROLS} == set(RULES)


def test_the_floors_are_read_as_drawn() -> None:
    labels, levels = read_floors("<!-- floors -->\n```\nF1   b | c\nF0   a\n```\n<!-- /floors -->")
    assert labels == ["F0", "F1"]
    assert levels == {"a": 0, "b": 1, "c": 1}
