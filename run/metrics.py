"""What a run records.

config.json      the resolved settings
metrics.jsonl    a row per update, and one per evaluation
timeline.jsonl   a row per span of work: what (search, train, sync, evaluate, save), start, end, in seconds of training
samples.jsonl    a row per update: one of its groups, as text; after 256 MiB it is renamed to samples.1.jsonl
engine.log       what vLLM printed, and the processes of other ranks
report.html      all of it as a page (tools/report.py)

With --tensorboard or --wandb metrics go there too, as train/<name> and eval/<name>.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buffer import Group, Response
from config import Config, RunError
from run.checkpoint import by_step
from run.console import Progress
from run.prompts import Prompt
from run.trackers import TRACKERS

MAX_BAD_UPDATES = 10  # in a row, whose loss or gradient is not finite: the run ends
SAMPLES_BYTES = 2**28  # of samples.jsonl; there are at most two such files

log = logging.getLogger("tba")


class Metrics:
    """The files of a run, its progress line and its trackers, all closed at the end of the `with`.

    Args:
        out: the run's folder.
        config: the settings.
        tokenizer: decodes the samples.
        step: updates done before; rows of later ones are removed, since these updates are made again.
        elapsed_before: seconds of training until then.

    Raises:
        OSError: a file cannot be written.
        ValueError: a tracker refuses.
    """

    def __init__(self, out: Path, config: Config, tokenizer: Any, step: int = 0, elapsed_before: float = 0.0):
        self.out, self.config, self.tokenizer = out, config, tokenizer
        self.first_step, self.elapsed_before = step, elapsed_before
        self.skipped = self.bad_in_a_row = 0  # updates whose loss or gradient was not finite
        self.progress: Progress | None = None  # once the clock runs
        self.under_way: Counter[str] = Counter()  # open spans
        self.busy: defaultdict[str, float] = defaultdict(float)  # seconds with open spans of a kind, until none was
        self.opened: dict[str, float] = {}  # when the first of the open spans of a kind was
        self.reward = 0.0  # mean over the responses that search found last
        self.disk_full = False
        self.start = time.perf_counter()
        self.mark()
        rows = truncate_after(out / "metrics.jsonl", "step", step)
        self.evaluations = {row["step"]: _evaluated(row) for row in rows if "loss" not in row}
        for name in ("samples", "samples.1"):
            truncate_after(out / f"{name}.jsonl", "step", step)
        truncate_after(out / "timeline.jsonl", "end", elapsed_before)
        self.trackers = {name: begin(out, config, step) for name, begin in TRACKERS.items() if getattr(config, name)}
        self.files = {name: Jsonl(out / f"{name}.jsonl") for name in ("metrics", "timeline")}
        self.files["samples"] = Jsonl(out / "samples.jsonl", SAMPLES_BYTES)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        if self.progress:
            self.progress.close()
        for name, (_, close) in list(self.trackers.items()):
            self._attempt(name, close)
        self._flush()
        for file in self.files.values():
            if file.unwritten:
                log.error(f"the last rows of {file.path} are lost")

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.elapsed_before + time.perf_counter() - self.start

    def start_clock(self) -> None:
        """Count the seconds of training from now on, and show progress."""
        self.start = time.perf_counter()
        self.progress = Progress(self.config.steps, self.first_step, self.config.max_seconds)
        self.mark()

    def mark(self) -> None:
        """Count rates and new responses from now on."""
        self.last_update = self.seconds, self.busy_seconds("search"), self.busy_seconds("train")
        self.new_responses: list[Response] = []

    def busy_seconds(self, what: str) -> float:
        """Time so far in which at least one span of a kind was open."""
        return self.busy[what] + (time.perf_counter() - self.opened[what] if self.under_way[what] else 0.0)

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator["Span"]:
        """Record when a piece of work started and ended; one that fails or is cancelled has no row."""
        span, start = Span(), self.seconds
        if not self.under_way[what]:
            self.opened[what] = time.perf_counter()
        self.under_way[what] += 1
        try:
            yield span
        finally:
            span.seconds = self.seconds - start
            self.under_way[what] -= 1
            if not self.under_way[what]:
                self.busy[what] += time.perf_counter() - self.opened[what]
        if self.progress:  # written with the next update: one write for many searches
            end = start + span.seconds
            self.files["timeline"].append({"what": what, "start": round(start, 4), "end": round(end, 4)})

    def add(self, responses: list[Response]) -> None:
        """Count responses of search, with their rewards."""
        self.new_responses += responses

    def update(self, step: int, groups: list[Group], figures: dict, prompts: Sequence[Prompt]) -> None:
        """Record an update's metrics and its first group as a sample, and show progress.

        Args:
            step: updates before this one; the ages of its responses are counted from it.
            groups: its batch.
            figures: of the update and the parts of the run; `tokens`, which the trainer read, is not written.
            prompts: by prompt id.

        Raises:
            RunError: update after update had no finite loss or gradient.
        """
        texts_of_prompts = [prompts[group.prompt_id].text for group in groups]
        self._count_bad(step, figures, texts_of_prompts)
        figures = dict(figures)
        tokens, before, new = figures.pop("tokens"), self.last_update, self.new_responses
        self.mark()
        passed, search_busy, train_busy = (b - a for a, b in zip(before, self.last_update, strict=True))
        self.reward = float(np.mean([response.reward for response in new])) if new else self.reward
        batch = [response for group in groups for response in group.responses]
        ages = [step - response.version for response in batch]
        row = {
            "step": step + 1,
            "time": self.last_update[0],
            "reward": self.reward,
            "batch_reward": float(np.mean([response.reward for response in batch])),
            "age_mean": float(np.mean(ages)),
            "age_max": max(ages),
            "search_tokens_per_s": (found := sum(len(response.tokens) for response in new) / passed),
            "engine_tokens_per_s": found / max(1, figures.get("engines", 1)),
            "train_tokens_per_s": tokens / passed,
            "search_idle": max(0.0, 1 - search_busy / passed),
            "train_idle": max(0.0, 1 - train_busy / passed),
            "skipped": self.skipped,
        } | figures
        first = groups[0].responses
        texts = self.tokenizer.batch_decode([response.tokens for response in first], skip_special_tokens=True)
        sample = [
            {"text": text, "reward": response.reward, "age": step - response.version}
            for text, response in zip(texts, first, strict=True)
        ]
        self.files["samples"].append({"step": step + 1, "prompt": texts_of_prompts[0], "responses": sample})
        self._write(row, {f"train/{name}": value for name, value in row.items() if name != "step"})
        self.progress.update(step + 1, row["time"], row)
        if self.diverged:
            newest = next(iter(by_step(self.out).values()), "none")
            raise RunError(
                f"{self.bad_in_a_row} updates in a row had no finite loss or gradient: a lower --lr may help. The "
                f"newest checkpoint is {newest}"
            )

    @property
    def diverged(self) -> bool:
        """Whether update after update had no finite loss or gradient."""
        return self.bad_in_a_row >= MAX_BAD_UPDATES

    def _count_bad(self, step: int, figures: dict, prompts: list[str]) -> None:
        """Count an update that was skipped, for its loss or its gradient is not finite, and log its prompts."""
        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        self.skipped += 1
        shown = ", ".join(f"{prompt[:40]!r}" for prompt in prompts[:3])
        log.info(
            f"update {step + 1} is skipped: its loss is {figures['loss']:.4g}, the norm of its gradient "
            f"{figures['grad_norm']:.4g}; its prompts are {shown}"
            + f" and {len(prompts) - 3} more"
            * (len(prompts) > 3)
        )

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Record an evaluation's figures, and log them."""
        figures = {name: float(value) for name, value in figures.items()}
        self.evaluations[step] = figures
        named = {f"eval/{name}": value for name, value in figures.items()}
        self._write({"step": step, "time": self.seconds if self.progress else self.elapsed_before} | named, named)
        log.info(f"step {step}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}")

    def _write(self, row: dict, tracked: dict) -> None:
        """Write a row of metrics, and what the other files lack; give the trackers what is finite."""
        self.files["metrics"].append(_rounded(row))
        self._flush()
        known = {name: value for name, value in _rounded(tracked).items() if value is not None}
        for name, (write, _) in list(self.trackers.items()):
            self._attempt(name, write, known, row["step"])

    def _flush(self) -> None:
        """Write all files. A full disk does not end the run."""
        try:
            for file in self.files.values():
                file.flush()
        except OSError as error:
            if not self.disk_full:
                log.warning(f"{file.path} cannot be written ({error}): its rows are kept, and tried again")
            self.disk_full = True
        else:
            self.disk_full = False

    def _attempt(self, name: str, call: Callable, *arguments) -> None:
        """Call a tracker. One that fails gets no more metrics, and does not end the run."""
        try:
            call(*arguments)
        except Exception as error:
            log.warning(f"{name} gets no more metrics ({error}): metrics.jsonl has them all")
            self.trackers.pop(name)


class Span:
    """A piece of work."""

    seconds = 0.0  # when it has ended


class Jsonl:
    """A JSONL file that grows; at `max_bytes` it is renamed to <name>.1.jsonl, which replaces the one before."""

    def __init__(self, path: Path, max_bytes: float = math.inf):
        self.path, self.max_bytes, self.unwritten = path, max_bytes, b""
        path.open("ab").close()

    def append(self, row: dict) -> None:
        """Add a row, which `flush` writes."""
        self.unwritten += json.dumps(row).encode() + b"\n"

    def flush(self) -> None:
        """Write the rows; an OSError leaves what is not written to the next call."""
        if self.unwritten:
            with self.path.open("ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
                size = file.tell()
            if size > self.max_bytes:
                self.path.rename(self.path.with_suffix(".1.jsonl"))
                self.path.touch()


def truncate_after(path: Path, name: str, last: float) -> list[dict]:
    """Remove the rows of a file whose `name` is above `last`, and an incomplete last row; return those that stay."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept: list[tuple[bytes, dict]] = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the program was killed while it wrote this row
            row = json.loads(line)
            if row[name] <= last and line.endswith(b"\n"):
                kept.append((line, row))
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(line for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return [row for _, row in kept]


def _evaluated(row: dict) -> dict[str, float]:
    """An evaluation's figures from its row."""
    figures = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _rounded(row: dict) -> dict:
    """Six digits of each float; None, which JSON has, for what is not finite."""
    return {
        name: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in row.items()
    }
