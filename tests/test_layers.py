"""The tree is the architecture: who may import whom, what stays light, and what the package promises to export."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sp2dpo

SOURCE = Path(sp2dpo.__file__).parent

LAYERS = {
    0: ("errors", "hashing", "tables", "progress", "yamls", "numbers"),
    1: (
        *("rubric", "reply", "decision", "ensemble", "temperature", "loss", "rlhf", "score", "cost", "correlation"),
        *("methods", "arms"),
    ),
    2: ("settings", "prompts", "process", "pairs", "calls", "llm", "providers", "predictor", "runs"),
    3: ("annotate",),
    4: ("gaps", "schedule"),
    5: ("stages", "evidence", "verify", "train", "checklist"),
    6: ("audit", "distill", "report", "publish", "compare"),
    7: ("cli", "__main__"),
}
"""Rooms by layer; a room is a module or package directly below sp2dpo, and imports only from its own layer or below."""

EXCEPTIONS = {
    ("train.__main__", "cli"): "python -m sp2dpo.train is the command line under another name",
}

HEAVY = {
    **{name: {"train"} for name in ("trl", "datasets", "peft", "accelerate")},
    "torch": {"loss", "methods.losses", "train", "predictor.embed"},
    "transformers": {"train", "predictor.embed"},
    "matplotlib": {"report", "publish.picture"},
    "tokenizers": {"train", "report.texts"},
    "sklearn": {"audit", "distill"},
    "krippendorff": {"audit"},
    "ray": {"annotate.on_ray", "annotate.ray_nodes"},
}
"""Libraries that take seconds to load, or are not always there, and the only places that may know them."""

DOORS = {"aiohttp": "llm", "sqlite3": "calls", "typer": "cli"}
"""Each way to the outside, and the room that owns it."""

FILES = sorted(SOURCE.rglob("*.py"))
ROOM_LAYER = {room: layer for layer, rooms in LAYERS.items() for room in rooms} | {"": 1}  # the package's own face


def name_of(path: Path) -> str:
    """`annotate.run` for …/sp2dpo/annotate/run.py; empty for the package itself."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports, anywhere in it; a name that is no module stands for its module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {_module_of(f"{node.module}.{alias.name}") for alias in node.names}
    return frozenset(found)


def _module_of(name: str) -> str:
    path = SOURCE.parent / name.replace(".", "/")
    return name if path.is_dir() or path.with_suffix(".py").exists() else name.rpartition(".")[0]


def inner(path: Path) -> set[str]:
    """What a file imports of this package, without `sp2dpo.`; the public face itself is the empty name."""
    ours = {module for module in imported(path) if module.split(".")[0] == "sp2dpo"}
    return {module.removeprefix("sp2dpo").lstrip(".") for module in ours}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_layer() -> None:
    rooms = {room(name_of(path)) for path in FILES}
    assert rooms == set(ROOM_LAYER), "a new module or package belongs into LAYERS"


def test_a_module_imports_only_from_its_own_layer_or_below() -> None:
    edges = {(name_of(path), other) for path in FILES for other in inner(path)}
    upward = {(one, other) for one, other in edges if ROOM_LAYER[room(other)] > ROOM_LAYER[room(one)]}
    assert upward == set(EXCEPTIONS)


@pytest.mark.parametrize("path", [path for path in FILES if room(name_of(path)) in LAYERS[1]], ids=name_of)
def test_a_pure_module_knows_only_the_errors_and_its_neighbours(path: Path) -> None:
    assert {room(module) for module in inner(path)} <= {"errors", *LAYERS[1]}
    outside = {room(module) for module in imported(path)}
    assert not outside & {"pathlib", "os", "io", "asyncio", "pyarrow", "yaml", "rich", *DOORS}


def users(library: str) -> set[str]:
    return {name_of(path) for path in FILES if library in {room(module) for module in imported(path)}}


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_is_imported_only_in_the_places_named_for_it(library: str) -> None:
    homes = HEAVY[library]
    assert {name for name in users(library) if not {name, room(name)} & homes} == set()


@pytest.mark.parametrize("library", DOORS)
def test_one_room_owns_each_door_to_the_outside(library: str) -> None:
    assert {room(name) for name in users(library)} == {DOORS[library]}


@pytest.mark.parametrize("library", ["openai", "httpx", "httpx2", "requests"])
def test_nothing_else_speaks_http(library: str) -> None:
    assert users(library) == set()


@pytest.mark.parametrize(
    "module",
    ["sp2dpo", "sp2dpo.cli", "sp2dpo.methods", "sp2dpo.stages", "sp2dpo.annotate.run", "sp2dpo.train.data"],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_the_package_exports_what_the_contract_names_and_nothing_else() -> None:
    names = ["SemanticGap", "__version__", "envelope", "majority_category", "parse_reply", "schedule_beta"]
    assert sorted(sp2dpo.__all__) == names
    assert all(hasattr(sp2dpo, name) for name in names)


def top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_says_what_it_is_and_exports_only_what_it_has(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    exports = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    names = set(ast.literal_eval(exports[0])) if exports else set()
    if "__getattr__" not in top_level_names(tree):
        assert names <= top_level_names(tree)
