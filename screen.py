"""What a person at the screen sees: lines, a clock while something starts, and how training goes.

On a terminal the clock ticks and progress is a bar of at most 120 columns; in a file both are plain lines.
"""

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

from tqdm import tqdm

COLUMNS = 120
PLAIN_SECONDS = 10  # between two lines where there is no terminal
SMOOTH = 0.1  # weight of the newest update in what the bar shows


class Failure(RuntimeError):
    """Ends the run. Its text says all that there is to say, in one line, so that no traceback is shown."""


class Screen:
    """Standard output or error, without which the run goes on: its file may be full, its reader gone."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def say(text: str, complaint: bool = False) -> None:
    """A line for the person at the screen, above the bar; a complaint goes where errors go."""
    file = sys.stderr if complaint else sys.stdout
    tqdm.write(printable(text), file=file)
    file.flush()


@contextlib.contextmanager
def clock(what: str, leave: bool = True) -> Iterator[None]:
    """Show what is under way and for how long, and in the end how long it took, unless that is nothing.

    Args:
        what: is under way.
        leave: a line that stays; else only a terminal shows it, while it lasts.
    """
    began, done = time.perf_counter(), threading.Event()

    def tick(file: int) -> None:
        with (
            os.fdopen(file, "w") as terminal,
            tqdm(desc=f"{what} ...", bar_format="{desc}", leave=False, ncols=COLUMNS, file=terminal) as line,
        ):
            while not done.wait(0.5):
                line.set_description_str(f"{what} ... {time.perf_counter() - began:.0f} s")

    ticking = None
    if sys.stderr.isatty():
        # A file of its own, from here on: engines are started while the standard ones lead to their log.
        ticking = threading.Thread(target=tick, args=(os.dup(sys.stderr.fileno()),), daemon=True)
        ticking.start()
    elif leave:
        say(f"{what} ...")
    try:
        yield
    finally:
        done.set()
        if ticking:
            ticking.join()
    if leave and (seconds := time.perf_counter() - began) >= 1:
        say(f"{what} took {seconds:.0f} s")


class Progress:
    """How training goes, in one line.

    Args:
        steps: updates in all.
        done: updates made before this process.
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
        """Show that so many updates are made, after so many seconds of training, and their figures, smoothed."""
        for name, value in figures.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                before = self.smooth.get(name, value)
                self.smooth[name] = before + SMOOTH * (value - before)
        line = f"{step}/{self.steps} [{self._left(step, seconds)}] {status(self.smooth)}"
        if self.bar is not None:
            self.bar.set_description_str(line, refresh=False)
            self.bar.update()
        elif time.perf_counter() - self.shown > PLAIN_SECONDS:
            self.shown = time.perf_counter()
            say(line)

    def close(self) -> None:
        """Leave the last line."""
        if self.bar is not None:
            self.bar.close()

    def _left(self, step: int, seconds: float) -> str:
        """Time so far and time left, as in 00:41<00:59."""
        left = (self.steps - step) * (time.perf_counter() - self.began) / (step - self.first)
        if self.max_seconds:
            left = min(left, max(0.0, self.max_seconds - seconds))
        return f"{tqdm.format_interval(seconds)}<{tqdm.format_interval(left)}"


def status(figures: dict[str, float]) -> str:
    """The figures of an update in a line.

    >>> status(dict(reward=0.412, kl=0.531, age_mean=2.1, search_tokens_per_s=24100, train_tokens_per_s=182000,
    ...             search_idle=0.03, train_idle=0.12))
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
