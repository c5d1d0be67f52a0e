"""The forks in examples/, as their first lines say to run them."""

import json
import subprocess
import sys

import pytest

from tests.runs import PROJECT, updates_of


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("best_and_worst", ("--replay", "best_and_worst", "--on-policy-prob", "0.5")),
        ("tb_huber", ("--loss", "tb_huber")),
    ],
)
def test_a_fork_runs(module, flag, embedded, tmp_path, nothing_left):
    text = (PROJECT / "examples" / f"{module}.py").read_text()
    given = f"python -m examples.{module} {' '.join(flag)}"
    assert given in text.splitlines()
    arguments = [
        *("--model", embedded[1], "--out", tmp_path / "run", "--steps", 15, "--prime", 64, "--eval-prompts", 0),
        *("--save-every", 0),
    ]
    command = [sys.executable, *given.split()[1:], *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())[flag[0][2:]] == flag[1]
    assert len(updates_of(tmp_path / "run")) == 15 and "Traceback" not in done.stderr
    refused = subprocess.run(
        [sys.executable, "tba.py", *flag, "--dry-run"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and f"is '{flag[1]}': it must be one of" in refused.stderr  # without the fork
