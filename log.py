"""What a run leaves behind.

config.json      the resolved settings
metrics.jsonl    an object an update, and one an evaluation
timeline.jsonl   an object a span of work: what (search, train, sync, evaluate, save), start, end, in seconds of the run
samples.jsonl    an object an update: one of its groups, as text; after 256 MiB it becomes samples.1.jsonl
undone/          rows of updates that a resumed run made anew, for they came after its checkpoint
engine.log       what vLLM printed
report.html      all of it as a page (report.py)
"""

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from buffer import Group
from config import Config
from screen import Progress, say
from trackers import Tracker

SAMPLES_BYTES = 2**28  # of samples.jsonl; there are at most two such files


class Rows:
    """A JSONL file that grows. What a full disk does not take is kept, and written before the next row.

    Args:
        path: the file.
        limit: bytes after which it is renamed to <name>.1.jsonl, in the place of what had that name.
    """

    def __init__(self, path: Path, limit: float = float("inf")):
        self.path, self.limit = path, limit
        self.unwritten = b""
        self.file = path.open("ab", buffering=0)

    def append(self, row: dict) -> None:
        """Add a row, to be written by `flush`."""
        self.unwritten += json.dumps(row).encode() + b"\n"

    def flush(self) -> None:
        """Write what is unwritten: it is on disk if the program is killed.

        Raises:
            OSError: not all could be.
        """
        if not self.unwritten:
            return
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.file.tell() > self.limit:
            fresh = self.path.with_suffix(".tmp")
            with self.file:  # is closed once there is another
                self.file = fresh.open("ab", buffering=0)
                self.path.rename(self.path.with_suffix(".1.jsonl"))
                fresh.rename(self.path)


class Log:
    """The files of a run, its line of progress, and its trackers.

    Args:
        out: the run's folder.
        config: the settings.
        step: updates done before, whose rows stay; later ones are set aside, for they will be made again.
        before: seconds that a resumed run took until then.
        trackers: get the metrics too.
    """

    def __init__(self, out: Path, config: Config, step: int = 0, before: float = 0.0, trackers: Sequence[Tracker] = ()):
        self.out, self.config, self.before, self.trackers = out, config, before, list(trackers)
        self.progress: Progress | None = None  # while the clock runs
        self.under_way: Counter[str] = Counter()  # spans that are open
        self.full = False  # a row could not be written
        rows = set_aside(out / "metrics.jsonl", "step", step)
        self.evaluations = {  # by step
            row["step"]: {
                name.removeprefix("eval/"): math.nan if value is None else value
                for name, value in row.items()
                if name.startswith("eval/")
            }
            for row in rows
            if "loss" not in row
        }
        for name, key, last in (("samples", "step", step), ("samples.1", "step", step), ("timeline", "end", before)):
            set_aside(out / f"{name}.jsonl", key, last)
        limits = {"metrics": float("inf"), "timeline": float("inf"), "samples": SAMPLES_BYTES}
        self.files = {name: Rows(out / f"{name}.jsonl", limit) for name, limit in limits.items()}
        self.initial = step
        self.start = time.perf_counter()

    @property
    def time(self) -> float:
        """Seconds since searching and training began."""
        return self.before + time.perf_counter() - self.start

    def start_clock(self) -> None:
        """Searching and training begin: time counts from here."""
        self.start = time.perf_counter()
        self.progress = Progress(self.config.steps, self.initial, self.config.max_seconds)

    def write(self, name: str, row: dict) -> None:
        """Append a row to a file, and write what is unwritten of all.

        A full disk does not end the run: what it does not take is written later.
        """
        self.files[name].append(row)
        try:
            for file in self.files.values():
                file.flush()
        except OSError as error:
            if not self.full:
                say(f"{file.path} cannot be written ({error}): its rows are kept, and tried again")
            self.full = True
        else:
            self.full = False

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Note when a piece of work began and ended."""
        start = self.time
        self.under_way[what] += 1
        try:
            yield
        finally:
            self.under_way[what] -= 1
        if self.progress:  # written with the next update: one write for many searches
            self.files["timeline"].append({"what": what, "start": round(start, 4), "end": round(self.time, 4)})

    def update(self, done: int, figures: dict, groups: list[Group], prompt: str, texts: Callable) -> None:
        """Write an update's metrics and a sample, the first of its groups, and show how it goes.

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
        rounded = {name: _rounded(value) for name, value in row.items()}
        self.write("metrics", rounded)
        self.track({f"train/{name}": value for name, value in rounded.items() if name != "step"}, done + 1)
        first = groups[0].responses
        sample = [
            {"text": text, "reward": response.reward, "age": done - response.version}
            for text, response in zip(texts(first), first, strict=True)
        ]
        self.write("samples", {"step": done + 1, "prompt": prompt, "responses": sample})
        self.progress.update(done + 1, row["time"], row)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write an evaluation's figures, and say them."""
        self.evaluations[step] = figures
        row = {f"eval/{name}": _rounded(value) for name, value in figures.items()}
        self.write("metrics", {"step": step, "time": _rounded(self.time if self.progress else self.before)} | row)
        self.track(row, step)
        say(f"step {step}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}")

    def track(self, figures: dict[str, float | None], step: int) -> None:
        """Give figures to the trackers; one that fails gets no more, and does not end the run."""
        known = {name: value for name, value in figures.items() if value is not None}
        for tracker in self.trackers[:]:
            try:
                tracker.log(known, step)
            except Exception as error:
                say(f"{type(tracker).__name__} gets no more metrics ({error}): metrics.jsonl has them all")
                self.trackers.remove(tracker)

    def close(self) -> None:
        """Close all."""
        if self.progress:
            self.progress.close()
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                say(f"{type(tracker).__name__} may lack the last metrics ({error}): metrics.jsonl has them all")
        for file in self.files.values():
            try:
                file.flush()
            except OSError as error:
                say(f"the last rows of {file.path} are lost ({error})")
            file.file.close()


def _rounded(value: float) -> float | None:
    """Six digits; None, which JSON has, for what is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def set_aside(path: Path, name: str, last: float) -> list[dict]:
    """Move the rows of a file, if it is there, in which a figure is above `last`, and a torn one at its end, to the
    folder undone/; returns those that stay."""
    if not path.is_file():
        return []
    stay: list[bytes] = []
    go: list[bytes] = []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            keep = row[name] <= last and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):  # the program was killed while it wrote it
            keep = False
        (stay if keep else go).append(line)
        if keep:
            rows.append(row)
    if go:
        aside = path.parent / "undone" / path.name
        aside.parent.mkdir(exist_ok=True)
        with aside.open("ab") as file:
            file.writelines(go)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(stay)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return rows
