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


OPTIONAL = {"search.remote", "search.host"}  # what an option needs, and imports only then
CORE = [path for name, path in MODULES.items() if (FLOORS[top(name)] < 3 or name == "tba") and name not in OPTIONAL]


def imported(node: ast.AST) -> Iterator[str]:
    """What a statement imports."""
    if isinstance(node, ast.Import):
        yield from (each.name for each in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import"
        yield from (f"{node.module}.{each.name}" for each in node.names)


def imports(path: Path) -> Iterator[str]:
    """What a file imports, in its functions too, but not `if TYPE_CHECKING:`."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        yield from imported(node)
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)


def ours(path: Path) -> set[str]:
    """Our modules that a file imports: of `tasks.Problem` it is `tasks`, of `tasks.data.read` `tasks.data`."""
    found = set()
    for name in imports(path):
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


def test_what_is_optional_is_imported_by_functions_alone():
    for name, path in MODULES.items():
        at_once = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "col_offset", 1) == 0]
        found = {alias for node in at_once for alias in imported(node)}
        assert name in OPTIONAL or not [each for each in found if each.startswith(tuple(OPTIONAL))], name


def test_only_what_is_optional_imports_ray():
    assert {name for name, path in MODULES.items() if "ray" in map(top, imports(path))} == OPTIONAL


def test_there_are_no_circles():
    TopologicalSorter({name: ours(path) for name, path in MODULES.items()}).prepare()


def test_there_are_no_other_files():
    """What is at the top, or in a folder there, has a floor; beside it is what measures and tests it."""
    paths = [*PROJECT.glob("*.py"), *PROJECT.glob("[!.]*/*.py")]
    assert {path.relative_to(PROJECT).parts[0].removesuffix(".py") for path in paths} == {*FLOORS, "bench", "tests"}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", [*CORE, *map(MODULES.get, OPTIONAL)], ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_file_of_the_core_fits_in_one_sitting(path):
    assert lines(path) <= 300


def test_the_core_is_small():
    """At most 2,000 lines, docstrings and comments included, blank ones not."""
    assert sum(bool(line.strip()) for path in CORE for line in path.read_text().splitlines()) <= 2000
