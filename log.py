"""What a run leaves behind and shows on the screen.

config.json      the resolved settings
metrics.jsonl    an object an update, and one an evaluation
timeline.jsonl   an object a span of work: what (search, train, sync, evaluate), start, end, in seconds of the run
samples.jsonl    an object an update: one of its groups, as text
engine.log       what vLLM printed
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from buffer import Group


class Log:
    """The files of a run and its progress bar.

    Args:
        out: the run's folder.
        steps: updates in all.
        step: updates done before, whose rows stay; later ones are dropped, for they will be made again.
    """

    def __init__(self, out: Path, steps: int, step: int = 0):
        self.out, self.steps = out, steps
        self.bar: tqdm | None = None
        self.before = 0.0  # seconds that a resumed run took until then
        if step:
            self.before = max(row["time"] for row in _keep_rows(out / "metrics.jsonl", "step", step))
            _keep_rows(out / "samples.jsonl", "step", step)
            _keep_rows(out / "timeline.jsonl", "end", self.before)
        self.files = {name: (out / f"{name}.jsonl").open("a") for name in ("metrics", "timeline", "samples")}
        self.initial = step
        self.start = time.perf_counter()

    @property
    def time(self) -> float:
        """Seconds since searching and training began."""
        return self.before + time.perf_counter() - self.start

    def start_clock(self) -> None:
        """Searching and training begin: time counts from here."""
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=self.steps, initial=self.initial, desc="training", unit="update", ncols=120,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )  # fmt: skip

    def write(self, name: str, row: dict) -> None:
        """Append a row to a file; it is on disk if the program is killed."""
        print(json.dumps(row), file=self.files[name], flush=True)

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Note when a piece of work began and ended."""
        start = self.time
        yield
        if self.bar:  # the clock runs
            self.write("timeline", {"what": what, "start": round(start, 4), "end": round(self.time, 4)})

    def update(self, done: int, figures: dict, groups: list[Group], prompt: str, texts: Callable) -> None:
        """Write an update's metrics and a sample, the first of its groups, and move the bar on.

        Args:
            done: updates before this one, from which the ages of its responses are counted.
            figures: of the update.
            groups: that it was made with.
            prompt: the first group's.
            texts: gives the texts of responses.
        """
        responses = [response for group in groups for response in group.responses]
        ages = [done - response.version for response in responses]
        row = {"step": done + 1, "time": self.time} | figures
        row |= {
            "batch_reward": float(np.mean([response.reward for response in responses])),
            "age_mean": float(np.mean(ages)),
            "age_max": max(ages),
        }
        self.write("metrics", {name: _rounded(value) for name, value in row.items()})
        first = groups[0].responses
        sample = [
            {"text": text, "reward": response.reward, "age": done - response.version}
            for text, response in zip(texts(first), first, strict=True)
        ]
        self.write("samples", {"step": done + 1, "prompt": prompt, "responses": sample})
        self.bar.set_postfix_str(
            f"reward {row['reward']:.3f}, age {row['age_mean']:.1f}, "
            f"search {row['search_tokens_per_s']:,.0f}/s, train {row['train_tokens_per_s']:,.0f}/s",
            refresh=False,
        )
        self.bar.update()

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write an evaluation's figures."""
        row = {f"eval/{name}": _rounded(value) for name, value in figures.items()}
        self.write("metrics", {"step": step, "time": _rounded(self.time if self.bar else self.before)} | row)

    def close(self) -> None:
        """End the bar and close the files."""
        if self.bar:
            self.bar.close()
        for file in self.files.values():
            file.close()


def say(text: str) -> None:
    """A line for the person at the screen, above the bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def table(evaluations: dict[int, dict[str, float]]) -> str:
    """The first and the last of the evaluations, given by step, side by side."""
    shown = {step: evaluations[step] for step in sorted({min(evaluations), max(evaluations)})}
    names = dict.fromkeys(name for figures in shown.values() for name in figures)
    width = max(14, *(len(name) + 2 for name in names))
    lines = [f"{'held out':{width}}" + "".join(f"{f'step {step}':>14}" for step in shown)]
    for name in names:
        lines.append(f"{name:{width}}" + "".join(f"{figures.get(name, math.nan):14.3f}" for figures in shown.values()))
    return "\n".join(lines)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _keep_rows(path: Path, name: str, last: float) -> list[dict]:
    """Drop the rows in which a figure is above `last`; returns those that stay."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row[name] <= last]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
    return rows
