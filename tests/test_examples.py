"""The forks in examples/, as their first lines say to run them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

from tests.runs import PROJECT, updates_of

SHORT = ("--steps", 15, "--prime", 64, "--eval-prompts", 0, "--save-every", 0)


def given(module: str) -> list[str]:
    """The command in its docstring."""
    text = (PROJECT / "examples" / f"{module}.py").read_text()
    return next(line for line in text.splitlines() if line.startswith(f"python -m examples.{module} ")).split()


def left(out: Path) -> dict:
    """The settings of a run that has made its updates."""
    assert len(updates_of(out)) == 15
    return json.loads((out / "config.json").read_text())


def test_a_sampling_rule_of_ones_own(embedded, tmp_path, nothing_left):
    """By the very command; without the fork there is no such rule."""
    out, words = tmp_path / "run", given("best_and_worst")[1:]
    command = [sys.executable, *words, *map(str, ("--model", embedded[1], "--out", out, *SHORT))]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert left(out)["replay"] == "best_and_worst"
    command = [sys.executable, "tba.py", *words[2:], "--dry-run"]
    refused = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "is 'best_and_worst': it must be one of" in refused.stderr


def test_an_objective_of_ones_own(embedded, tmp_path, nothing_left, main):
    """In this process, which is quicker."""
    importlib.import_module("examples.tb_huber")
    words, out = given("tb_huber")[3:], tmp_path / "run"
    done = main(*words, "--model", embedded[1], "--out", out, *SHORT)
    assert done.code == 0, done.err
    assert left(out)["loss"] == "tb_huber"
