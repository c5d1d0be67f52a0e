"""What a person at the terminal sees: log lines, the progress of training, and a table of evaluations.

On a terminal progress is a bar of at most 120 columns, with log lines above it; in a file both are plain lines.
"""

import asyncio
import contextlib
import logging
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from tqdm import tqdm

COLUMNS = 120
PLAIN_SECONDS = 10  # between two lines of progress where there is no terminal
SMOOTHING = 0.1  # weight of the newest update in the figures shown

log = logging.getLogger("tba")


class TqdmHandler(logging.Handler):
    """Writes lines above the bar: errors to stderr, all else to stdout. Where it cannot, the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        file = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        try:
            tqdm.write(printable(self.format(record)), file=file)
            file.flush()
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Let the lines of `logging.getLogger("tba")` be seen, from INFO on."""
    logging.raiseExceptions = False  # a disk that is full, or a reader that is gone, ends nothing
    log.setLevel(logging.INFO)
    log.handlers[:] = [TqdmHandler()]
    log.propagate = False  # a library may have given the root a handler, which would write each line again


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Log what begins, and how long it took if that was a second or more."""
    began = time.perf_counter()
    log.info(f"{what} ...")
    yield
    if (seconds := time.perf_counter() - began) >= 1:
        log.info(f"{what} took {seconds:.0f} s")


class Watchdog:
    """Logs a message when an event has not happened for a while; again after twice as long, and so on.

    Args:
        seconds: how long a while is.
        status: returns in a line what the run is doing and what it waits for.
    """

    def __init__(self, seconds: float, status: Callable[[], str]):
        self.seconds, self.status = seconds, status
        self.last = dict.fromkeys(("response", "update"), time.monotonic())

    def beat(self, event: str) -> None:
        """Note that the event has happened."""
        self.last[event] = time.monotonic()

    async def run(self) -> None:
        """Watch, until cancelled."""
        self.last = dict.fromkeys(self.last, time.monotonic())
        patience = dict.fromkeys(self.last, self.seconds)
        while True:
            await asyncio.sleep(self.seconds / 20)
            for event, last in self.last.items():
                silent = time.monotonic() - last
                if silent < self.seconds:
                    patience[event] = self.seconds
                elif silent >= patience[event]:
                    patience[event] = 2 * silent
                    log.info(f"no {event} for {silent:.0f} s: {self.status()}")


class Progress:
    """The progress of training, in one line.

    Args:
        steps: updates in all.
        done: updates before this process.
        max_seconds: of training, after which it ends; 0: no limit.
    """

    def __init__(self, steps: int, done: int, max_seconds: float):
        self.steps, self.first, self.max_seconds = steps, done, max_seconds
        self.began = self.shown = time.perf_counter()
        self.smooth: dict[str, float] = {}
        self.bar = None
        if sys.stderr.isatty():
            columns = min(COLUMNS, shutil.get_terminal_size().columns)
            self.bar = tqdm(total=steps, initial=done, bar_format="{percentage:3.0f}%|{bar}| {desc}", ncols=columns)

    def update(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Show the updates so far, the seconds of training so far, and the figures of the newest update, smoothed."""
        for name, value in figures.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                before = self.smooth.get(name, value)
                self.smooth[name] = before + SMOOTHING * (value - before)
        left = (self.steps - step) * (time.perf_counter() - self.began) / (step - self.first)
        if self.max_seconds:
            left = min(left, max(0.0, self.max_seconds - seconds))
        times = f"{tqdm.format_interval(seconds)}<{tqdm.format_interval(left)}"  # so far and left, as in 00:41<00:59
        line = f"{step}/{self.steps} [{times}] {status_line(self.smooth)}"
        if self.bar is not None:
            self.bar.set_description_str(line, refresh=False)
            self.bar.update()
        elif time.perf_counter() - self.shown > PLAIN_SECONDS:
            self.shown = time.perf_counter()
            log.info(line)

    def close(self) -> None:
        """Leave the last line."""
        if self.bar is not None:
            self.bar.close()


def status_line(figures: dict[str, float]) -> str:
    """The figures of an update in a line.

    >>> status_line(dict(reward=0.412, kl=0.531, age_mean=2.1, search_tokens_per_s=24100, train_tokens_per_s=182000,
    ...                  search_idle=0.03, train_idle=0.12))
    'reward 0.412 KL 0.53 age 2.1 | search 24.1k/s 3% idle | train 182k/s 12% idle'
    """
    shown = defaultdict(lambda: math.nan, figures)
    kl = "KL {kl:.2f} " if "kl" in figures else ""
    parts = [("reward {reward:.3f} " + kl + "age {age_mean:.1f}").format_map(shown)]
    for what in ("search", "train"):
        speed = tqdm.format_sizeof(shown[f"{what}_tokens_per_s"])
        parts.append(f"{what} {speed}/s {shown[f'{what}_idle']:.0%} idle")
    return " | ".join(parts)


def printable(text: str) -> str:
    """The text with what a terminal would obey escaped: a model may have written it.

    >>> print(printable("red: \\x1b[31m, right to left: \\u202e, and a\\nsecond line"))
    red: \\x1b[31m, right to left: \\u202e, and a
    second line
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def table(evaluations: dict[int, dict[str, float]]) -> str:
    """The first and the last of the evaluations, given by step, side by side."""
    shown = {step: evaluations[step] for step in sorted({min(evaluations), max(evaluations)})}
    names = dict.fromkeys(name for figures in shown.values() for name in figures)
    width = max(14, *(len(name) + 2 for name in names))
    lines = [f"{'held out':{width}}" + "".join(f"{f'step {step}':>14}" for step in shown)]
    for name in names:
        lines.append(f"{name:{width}}" + "".join(f"{figures.get(name, math.nan):14.3f}" for figures in shown.values()))
    return "\n".join(lines)
