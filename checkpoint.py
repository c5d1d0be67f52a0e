"""Checkpoints: what a run needs to go on, in OUT/checkpoints/step-N/.

    model.safetensors, config.json, ...   the policy, as a Hugging Face folder
    optimizer.safetensors                 the optimiser
    reference/                            the reference, where it was reset
    buffer.safetensors                    every trajectory that is stored
    state.json                            the rest: step, clock, random states, prompts to come, settings, files

A folder of that name is whole: it is written under another, flushed to the disk, then renamed. `best` is a link to the
one with the best evaluation. No file is read by pickle.
"""

import asyncio
import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from screen import say

UNFINISHED = ".tmp"  # what a folder's name ends with while it is written or removed


class Checkpoints:
    """Writes the checkpoints of a run, one after another in a thread of its own.

    Args:
        out: the run's folder.
        keep: how many of the newest stay; 0: all. The one with the best score stays too.
    """

    def __init__(self, out: Path, keep: int):
        self.out, self.keep = out, keep
        self.scores: dict[int, float] = {}  # by step, the higher the better
        self.spare: int | None = None  # a step whose checkpoint stays too
        self.failed = ""  # why the last one could not be written
        self.thread = ThreadPoolExecutor(1, "save")
        self.writing = self.thread.submit(lambda: None)  # the last

    async def idle(self) -> None:
        """Return when none is being written."""
        await asyncio.wrap_future(self.writing)

    def save(self, state: dict, *writes: Callable[[Path], None]) -> None:
        """Begin to write the checkpoint of a step. Where that fails, it is said, and those before it stay.

        Args:
            state: has `step`, and all else that JSON can hold.
            writes: each writes a part into the folder that it is given.
        """
        self.writing = self.thread.submit(self._save, state, writes)

    def score(self, step: int, score: float) -> None:
        """Note how good the policy was at a step; nan: it is not known."""
        self.scores[step] = score
        self.spare = None
        self.thread.submit(self._prune)

    def end(self) -> None:
        """Return when all is written."""
        self.thread.shutdown()

    def _save(self, state: dict, writes: tuple[Callable[[Path], None], ...]) -> None:
        folder = self.out / "checkpoints" / f"step-{state['step']}"

        def write(to: Path) -> None:
            for part in writes:
                part(to)
            (to / "state.json").write_text(json.dumps(state | {"files": sizes(to)}))

        try:
            if not folder.is_dir():
                write_folder(folder, write)
        except Exception as error:
            self.failed = f"{folder} cannot be written ({error})"
            say(f"{self.failed}: those before it stay")
        else:
            self.failed = ""
            self._prune()

    def _prune(self) -> None:
        """Remove what need not stay, and let `best` be a link to the best."""
        steps = by_step(self.out)
        scores = {step: score for step, score in self.scores.copy().items() if math.isfinite(score)}
        best = max(steps.keys() & scores.keys(), key=lambda step: (scores[step], step), default=None)
        try:
            if best is not None:
                link = self.out / "checkpoints" / "best"
                unfinished = link.with_name(link.name + UNFINISHED)
                unfinished.unlink(missing_ok=True)
                unfinished.symlink_to(steps[best].name)
                unfinished.replace(link)
            for step in list(steps)[self.keep :] if self.keep else []:
                if step not in (best, self.spare):
                    with gone(steps[step]):
                        pass
        except OSError as error:
            say(f"checkpoints cannot be removed ({error})")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, which exists as soon as it is whole, in the place of any before it.

    Raises:
        Exception: it cannot be written; nothing is left of it.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
        with gone(folder):
            unfinished.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, which keeps what it had until it has all of the text."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)


def flush(path: Path) -> None:
    """Return when the disk has a file, or a folder's names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def gone(folder: Path) -> Iterator[None]:
    """Let a folder, if it is there, be gone, and then remove it: it is never seen half removed."""
    aside = folder.with_name(f"{folder.name}-old{UNFINISHED}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    yield
    shutil.rmtree(aside, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file of a checkpoint, but of its list."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "state.json"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def by_step(out: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints, the newest first."""
    found = {path.name.removeprefix("step-"): path for path in out.glob("checkpoints/step-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)}


def newest(out: Path) -> tuple[Path, dict] | None:
    """The folder and the state of a run's newest checkpoint that is whole; says which are not. None: there is none."""
    for folder in by_step(out).values():
        try:
            state = json.loads((folder / "state.json").read_text())
            if sizes(folder) == state["files"]:
                return folder, state
            reason = "a file is missing, or is not as long as it was"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        say(f"{folder} is damaged ({reason}): the checkpoint before it is used")
    return None


def tidy(out: Path, step: int) -> None:
    """Remove what a run that was killed left unfinished, and rename damaged checkpoints: those after `step`."""
    for path in [*out.glob(f"*{UNFINISHED}"), *out.glob(f"checkpoints/*{UNFINISHED}")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in [folder for at, folder in by_step(out).items() if at > step]:
        with gone(aside := folder.with_name(f"{folder.name}.damaged")):
            folder.rename(aside)


def lock(out: Path) -> IO:
    """Take a run's folder for this process, until it ends or what is returned is closed.

    Raises:
        ValueError: another run has it.
    """
    file = (out / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = (out / "lock").read_text()
        raise ValueError(f"out is {str(out)!r}: another run (process {process}) is writing there") from None
    file.truncate(0)
    print(os.getpid(), file=file, end="", flush=True)
    return file
