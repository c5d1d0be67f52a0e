"""What engines import, beside what is installed for them."""

import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def serve(pipe, settings) -> None:
    """In place of `search.engine._serve`: an engine with a call more, `modules`."""
    from search import worker

    worker.Worker.modules = lambda self, call: self.send((call, list(sys.modules), None))
    worker.serve(pipe, settings)


def listed(file: str) -> list[Requirement]:
    """The requirements in a file."""
    lines = (Path(__file__).resolve().parents[1] / file).read_text().splitlines()
    return [Requirement(line) for line in (line.partition("#")[0].strip() for line in lines) if line]


def needed(todo: list[Requirement]) -> set[str]:
    """Names of these and of all that they need in turn."""
    done = set()
    while todo:
        each = todo.pop()
        name = canonicalize_name(each.name)
        for extra in {*each.extras, ""} - {extra for known, extra in done if known == name}:
            done.add((name, extra))
            theirs = map(Requirement, requires(name) or ())
            todo += [need for need in theirs if not need.marker or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in done}


def needless(modules: Iterable[str]) -> set[str]:
    """What requirements-cpu.txt lists and neither is imported by these modules' process nor needed by what
    requirements.txt lists, vLLM and what some options need aside."""
    distributions = packages_distributions()
    imported = {canonicalize_name(name) for each in modules for name in distributions.get(each, ())}
    ours = needed([each for each in listed("requirements.txt") if each.name not in ("vllm", "torchao", "peft")])
    return {canonicalize_name(each.name) for each in listed("requirements-cpu.txt")} - imported - ours
