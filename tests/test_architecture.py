"""Imports point down only, and the core is small."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.runs import PROJECT

FLOORS = dict(buffer=0, loss=0, config=1, search=2, train=2, rewards=3, tasks=4, run=5, tools=5, tba=6, examples=7)
FILES = [path for name in FLOORS for path in [*PROJECT.glob(f"{name}.py"), *PROJECT.glob(f"{name}/*.py")]]
MODULES = {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def top(name: str) -> str:
    return name.split(".")[0]


# What only a setting or a GPU needs, and what is imported only then.
OPTIONAL = {f"train.{name}" for name in ("cuda", "lora", "sharded")}
RAY = {"search.cluster", "search.host", "search.remote"}
OPTIONAL |= RAY
CORE = [path for name, path in MODULES.items() if FLOORS[top(name)] < 3 or name == "tba"]
SMALL = [path for path in CORE if path not in [MODULES[name] for name in OPTIONAL]]


def imports(path: Path, functions: bool = True) -> Iterator[str]:
    """What a file imports, in its functions too if so wanted, but not `if TYPE_CHECKING:`."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{each.name}" for each in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not typing_only and (functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


def ours(path: Path, functions: bool = True) -> set[str]:
    """Our modules that a file imports: of `tasks.Problem` it is `tasks`, of `tasks.data.read` `tasks.data`."""
    found = set()
    for name in imports(path, functions):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    """Of two folders on a floor neither imports the other, but for the run's, which shows plans and reports."""
    own = top(name)
    for each in map(top, ours(MODULES[name])):
        assert FLOORS[each] < FLOORS[own] or each == own or {each, own} == {"run", "tools"}, f"{name} imports {each}"


def test_only_an_engine_imports_vllm():
    assert [name for name, path in MODULES.items() if "vllm" in map(top, imports(path))] == ["search.worker"]


@pytest.mark.parametrize("name", sorted(name for name in MODULES.keys() - OPTIONAL if top(name) != "tools"))
def test_what_is_optional_is_imported_by_functions_only(name):
    assert not ours(MODULES[name], functions=False) & OPTIONAL


def test_only_what_is_optional_imports_ray():
    assert {name for name, path in MODULES.items() if "ray" in map(top, imports(path))} == RAY


def test_there_are_no_circles():
    TopologicalSorter({name: ours(path) for name, path in MODULES.items()}).prepare()


def test_there_are_no_other_files():
    """What is at the top, or in a folder there, has a floor; beside it is what measures and tests it."""
    paths = [*PROJECT.glob("*.py"), *PROJECT.glob("[!.]*/*.py")]
    assert {path.relative_to(PROJECT).parts[0].removesuffix(".py") for path in paths} == {*FLOORS, "bench", "tests"}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_file_of_the_core_fits_in_one_sitting(path):
    assert lines(path) <= 300


def test_the_core_is_small():
    """At most 2,000 lines, docstrings and comments included, blank ones not, nor what only a setting imports."""
    assert sum(bool(line.strip()) for path in SMALL for line in path.read_text().splitlines()) <= 2000
