"""The files in examples/, by the commands in their first lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from buffer import EVICTION, REPLAY, Buffer
from loss import OBJECTIVES, Batch, tb
from tests.runs import PROJECT, updates_of

OTHERS = "__init__", "smollm2"  # test_smollm2.py has that
EXAMPLES = [path.stem for path in sorted(PROJECT.glob("examples/*.py")) if path.stem not in OTHERS]
SHORT = ("--steps", 15, "--prime", 64, "--eval-prompts", 0, "--save-every", 0)


@pytest.fixture(autouse=True)
def names_as_before():
    """What a command adds to the names of functions is removed from this process."""
    before = [(known, dict(known)) for known in (OBJECTIVES, EVICTION, REPLAY)]
    yield
    for known, names in before:
        known.clear()
        known.update(names)


def command(name: str) -> list[str]:
    """What its docstring says to type, without `python`."""
    lines = (PROJECT / "examples" / f"{name}.py").read_text().splitlines()
    return next(line for line in lines if line.startswith("python tba.py ")).split()[1:]


def finished(out: Path, name: str) -> list[dict]:
    """The rows of the updates of a run that has made them, by settings that name the example."""
    words, rows = command(name), updates_of(out)
    field, value = next((words[i - 1], word) for i, word in enumerate(words) if word.startswith("examples/"))
    assert value == f"examples/{name}.py:{name}"
    assert json.loads((out / "config.json").read_text())[field.removeprefix("--")] == value
    assert len(rows) == 15
    return rows


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_is_given_by_its_path(name):
    text = (PROJECT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 20 and "__main__" not in text and "import tba" not in text
    assert f"examples/{name}.py:{name}" in command(name)


@pytest.mark.long
def test_a_sampling_rule_of_ones_own(embedded, tmp_path, nothing_left):
    """By the very command, as it is typed."""
    out = tmp_path / "run"
    words = [sys.executable, *command("best_and_worst"), *map(str, ("--model", embedded[1], "--out", out, *SHORT))]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    finished(out, "best_and_worst")


def test_an_objective_of_ones_own(embedded, tmp_path, nothing_left, main, monkeypatch):
    """In this process, which is quicker. What it returns beside the loss is in the metrics."""
    monkeypatch.chdir(PROJECT)
    done = main(*command("tb_huber")[1:], "--model", embedded[1], "--out", out := tmp_path / "run", *SHORT)
    assert done.code == 0, done.err
    assert all(0 <= row["far_off"] <= 1 for row in finished(out, "tb_huber"))


def test_the_objective_is_trajectory_balance_but_for_responses_that_are_far_off():
    from examples.tb_huber import tb_huber

    one, mask = torch.tensor([[[-1.0], [-2.0]]]), torch.ones(1, 2, 1)
    near, far = (Batch(one, one, one, mask, torch.tensor([[reward, 0.0]])) for reward in (1.0, 100.0))
    assert tb_huber(near, beta=0.5) == (tb(near, beta=0.5), {"far_off": 0.0}) and tb(near, beta=0.5) == 0.25
    assert tb_huber(far, beta=0.5) == (243.75, {"far_off": 1.0}) and tb(far, beta=0.5) == 2500


def test_an_eviction_rule_of_ones_own(embedded, tmp_path, nothing_left, main, monkeypatch):
    rules, gauges = set(), Buffer.gauges
    monkeypatch.setattr(Buffer, "gauges", lambda buffer: rules.add(buffer.evict.__name__) or gauges(buffer))
    monkeypatch.chdir(PROJECT)
    done = main(*command("cut_off_first")[1:], "--model", embedded[1], "--out", out := tmp_path / "run", *SHORT)
    assert done.code == 0, done.err
    finished(out, "cut_off_first")
    assert rules == {"cut_off_first"}


def test_a_rule_that_is_not_there_is_refused(main, monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    refused = main("--replay", "best_and_worst")
    assert refused.code == 2 and "is 'best_and_worst': it must be one of uniform, reward" in refused.out + refused.err
    refused = main("--replay", "examples/best_and_worst.py:best")
    assert refused.code == 2 and "has no function 'best'" in refused.out + refused.err
