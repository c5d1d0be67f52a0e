"""How long from the command to the first update, and where does the time go? The embedded task.

    python -m bench.start                       5 starts: about 3 minutes on 2 cores
    python -m bench.start --task gsm8k --model DIR     another task or model: all settings of tba.py
    python -m bench.start --json                prints, last, all figures as one JSON object

.venv and the warmed-up model are in place. Seconds from the command:

first_update        until the first update is in metrics.jsonl, which is the sum of
imports             Python, PyTorch, transformers, the problems
policy              loading policy and reference
engine              vLLM: what is left of its import, its process, the model, the first weights, the comparison
priming             searching the responses that training starts with, and the update
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.table import PROJECT, parser, table

ENDS = {"imports": "loading the policy", "policy": "starting vLLM"}  # a part: what is printed when it is over


def start(settings: list[str]) -> dict[str, float]:
    """Seconds of each part.

    Raises:
        RuntimeError: the run failed; shows what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, printed = Path(folder) / "run", Path(folder) / "printed"
        command = [sys.executable, "tba.py", "--steps", "1", "--eval-prompts", "0", *settings, "--out", str(out)]
        at: dict[str, float] = {}  # when a part was over
        began = time.perf_counter()
        with printed.open("w") as file:
            process = subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            text = printed.read_text()
            new = {part: time.perf_counter() - began for part, line in ENDS.items() if line in text}
            if updates(out):
                new["first_update"] = time.perf_counter() - began
            at = new | at
            time.sleep(0.005)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{printed.read_text()}")
        (update,) = updates(out)
    parts = {"imports": at["imports"], "policy": at["policy"] - at["imports"]}
    parts["engine"] = at["first_update"] - update["time"] - at["policy"]
    return {"first_update": at["first_update"]} | parts | {"priming": update["time"]}


def updates(out: Path) -> list[dict]:
    """The rows of the updates of a run, which may not have begun."""
    metrics = out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return [row for row in rows if "loss" in row]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    wanted, settings = commands.parse_known_args(arguments)
    start(settings)  # all files are in memory, and the model is there
    table([start(settings) for _ in range(wanted.repeats)], wanted.json)


if __name__ == "__main__":
    main()
