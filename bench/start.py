"""How long from the command to the first update, and where does the time go? The embedded task.

    python -m bench.start                       5 starts: about 3 minutes on 2 cores
    python -m bench.start --task gsm8k --model DIR     another task or model: all settings of tba.py
    python -m bench.start --json                prints, last, all figures as one JSON object

.venv and the warmed-up model are in place. Seconds from the command:

first_update        until the first update is in metrics.jsonl, which is the sum of
imports             Python, PyTorch, transformers, the problems
policy              loading policy and reference
engine              vLLM: its import, the start of its process, the model, the first weights, the comparison
priming             searching the responses that training starts with, and the update
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.runs import PROJECT, parser, table

ENDS = {  # a part: how the line begins and ends that is printed when it is over
    "imports": ("loading policy", "..."),
    "policy": ("starting vLLM", "..."),
    "engine": ("starting vLLM", " s"),
}


def start(settings: list[str]) -> dict[str, float]:
    """Seconds of each part.

    Raises:
        RuntimeError: the run failed; shows what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "tba.py", "--steps", "1", "--eval-prompts", "0", *settings, "--out", str(out)]
        began, at, printed = time.perf_counter(), {}, []
        with subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process:  # fmt: skip
            for line in process.stdout:
                printed.append(line)
                for part, (first, last) in ENDS.items():
                    if line.startswith(first) and line.rstrip().endswith(last):
                        at[part] = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(printed)}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    parts = {"imports": at["imports"], "policy": at["policy"] - at["imports"], "engine": at["engine"] - at["policy"]}
    parts["priming"] = next(row["time"] for row in rows if "loss" in row)
    return {"first_update": sum(parts.values())} | parts


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    wanted, settings = commands.parse_known_args(arguments)
    start(settings)  # all files are in memory, and the model is there
    table([start(settings) for _ in range(wanted.repeats)], wanted.json)


if __name__ == "__main__":
    main()
