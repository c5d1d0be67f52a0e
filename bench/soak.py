"""Does a run survive? Countdown for some minutes, while faults are thrown in at random.

    python -m bench.soak                        20 minutes
    python -m bench.soak --faults 3             until so many were thrown in
    python -m bench.soak --json                 prints, last, all figures as one JSON object

The faults: the program is killed or stopped (and given the same command again, with --resume auto), its newest
checkpoint is truncated meanwhile, its engine is killed, its disk is full for a while, a reward raises, hangs, is nan or
has the wrong length, a reward is so large that the loss overflows. Prints what was thrown in, and what it cost.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench.table import PROJECT, at_least
from run.checkpoint import by_step, newest
from search.searcher import MAX_DEATHS

TASK = Path(__file__).with_name("soak_task.py")
SAVE_EVERY = 50
GROUP = 16  # responses that are generated for a prompt
FAULTS = {"kill": 3, "stop": 1, "truncate": 1, "engine": 3, "disk": 2}  # how often each, in proportion


class Soak:
    """A run that is given faults.

    Args:
        out: its folder.
        seed: of the faults.
        settings: more, of tba.py.
    """

    def __init__(self, out: Path, seed: int, settings: list[str]):
        self.out, self.chance = out, random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.updates_lost = self.responses_lost = 0
        self.memory: list[tuple[float, float]] = []  # (the program, its engine) in MiB
        self.printed = (out.parent / "printed.log").open("w")
        self.command = [
            *(sys.executable, "tba.py", "--task", TASK, "--resume", "auto", "--out", out, "--steps", 10**6),
            *("--save-every", SAVE_EVERY, "--eval-every", 500, "--eval-prompts", 100, "--reward-timeout", 2),
            *("--lr-schedule", "constant", "--stall-seconds", 30, *settings),
        ]
        self.start()

    def start(self) -> None:
        """Give the command, and wait until it trains."""
        _, saved = newest(self.out) or (None, dict[str, Any](step=0, time=0.0))
        searches = [row for row in self.rows("timeline") if row["what"] == "search" and row["end"] > saved["time"]]
        self.updates_lost += max(0, self.last_step() - saved["step"])
        self.responses_lost += GROUP * len(searches)
        self.engine_deaths = 0  # of this process, which ends at the fourth in ten minutes
        self.process = subprocess.Popen(
            [*map(str, self.command)], cwd=PROJECT, stdout=self.printed, stderr=subprocess.STDOUT
        )
        while not self.engine() or self.last_step() <= saved["step"]:
            self.check()
            time.sleep(0.2)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the program has ended though nobody ended it.
        """
        if self.process.poll() is not None:
            last = Path(self.printed.name).read_text().replace("\r", "\n")[-6000:]
            raise RuntimeError(f"it ended with {self.process.returncode}:\n{last}")

    def rows(self, name: str) -> list[dict]:
        """The rows of one of its files, but for a last one that is incomplete."""
        path = self.out / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        """The step of its newest update."""
        return max((row["step"] for row in self.rows("metrics")), default=0)

    def engine(self) -> int:
        """The process of its engine, which its fork server has started; 0: there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                if process.ppid() != self.process.pid:
                    return process.pid
        return 0

    def weigh(self) -> None:
        """Note how much memory it has."""

        def resident(process: int) -> float:
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(process).memory_info().rss / 2**20
            return 0.0

        self.memory.append((resident(self.process.pid), resident(self.engine())))

    def throw(self) -> None:
        """One fault, and what it takes to go on."""
        (fault,) = self.chance.choices([*FAULTS], [*FAULTS.values()])
        if fault == "engine":
            fault = fault if self.engine_deaths < MAX_DEATHS else "kill"
            self.engine_deaths += 1
        self.faults[fault] += 1
        step = self.last_step()
        if fault in ("kill", "truncate"):
            self.process.kill()
            self.process.wait()
            if fault == "truncate" and (steps := by_step(self.out)):
                weights = next(iter(steps.values())) / "model.safetensors"
                os.truncate(weights, weights.stat().st_size // 2)
            self.start()
        elif fault == "stop":
            self.process.send_signal(signal.SIGTERM)
            if (code := self.process.wait(60)) != 143:
                raise RuntimeError(f"stopped, it ended with {code}")
            self.start()
        elif fault == "engine":
            while not (engine := self.engine()):  # 0 would be this process and all its kin
                self.check()
                time.sleep(0.2)
            os.kill(engine, signal.SIGKILL)
            while self.engine() in (0, engine):
                self.check()
                time.sleep(0.2)
        else:
            limits = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
            time.sleep(self.chance.uniform(3, 10))
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)
        while self.last_step() <= step:  # it trains on
            self.check()
            time.sleep(0.2)
        self.recoveries[fault] += 1

    def end(self) -> dict:
        """Stop the run, see that all is there, and say what was."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        rows = self.rows("metrics")
        updates = [row for row in rows if "loss" in row]
        steps = [row["step"] for row in updates]
        return {
            "exit_code": code,
            "updates": len(steps),
            "each_update_once": steps == list(range(1, len(steps) + 1)),
            "newest_checkpoint": newest(self.out)[1]["step"],
            "faults": dict(self.faults)
            | {"rewards": updates[-1]["reward_failures"], "overflows": updates[-1]["skipped"]},
            "recoveries": dict(self.recoveries),
            "updates_lost": self.updates_lost,
            "responses_lost": self.responses_lost,
            "memory_mib_start": [round(each) for each in self.memory[0]],
            "memory_mib_end": [round(each) for each in self.memory[-1]],
            "buffer_responses": updates[-1]["buffer_size"],
            "accuracy": [row["eval/pass@1"] for row in rows if "eval/pass@1" in row][-1],
        }


def main(arguments: list[str] | None = None) -> None:
    """Throw faults in, print what they cost."""
    commands = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands.add_argument("--minutes", type=float, default=20.0)
    commands.add_argument("--faults", type=at_least(1), default=10**6, help="at most")
    commands.add_argument("--pause", type=float, nargs=2, default=(10.0, 30.0), help="seconds between two faults")
    commands.add_argument("--seed", type=int, default=0)
    commands.add_argument("--json", action="store_true", help="print all figures as one JSON object, last")
    wanted, settings = commands.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        soak = Soak(Path(folder) / "run", wanted.seed, settings)
        time.sleep(wanted.pause[0] / 2)
        soak.weigh()
        while time.monotonic() - began < 60 * wanted.minutes and soak.faults.total() < wanted.faults:
            soak.throw()
            time.sleep(soak.chance.uniform(*wanted.pause))
            soak.weigh()
        found = soak.end()
    for name, value in found.items():
        print(f"{name.replace('_', ' '):30} {value}")
    if wanted.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
