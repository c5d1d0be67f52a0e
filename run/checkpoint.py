"""Checkpoints: the state of a run, in OUT/checkpoints/step-N/.

    model.safetensors, config.json, ...   the policy, as a Hugging Face folder; with --lora-rank its adapter, as peft's
    optimizer.pt                          the optimiser
    reference/                            the reference, where it was reset
    buffer.safetensors                    every response in the buffer, a column a field
    state.json                            the rest: step, clock, random states, prompts to come, settings, files

A folder of that name is complete: it is written under another, flushed to the disk, then renamed. `best` links to the
one with the best evaluation. No file is unpickled but by torch's `weights_only`.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

UNFINISHED = ".tmp"  # the end of a folder's name while it is written or removed

log = logging.getLogger("tba")


class Checkpoints:
    """Writes the checkpoints of a run, one after another in a thread of its own; a context that waits for the last.

    Args:
        out: the run's folder.
        keep: how many of the newest stay; 0: all. The one with the best score stays too.
    """

    def __init__(self, out: Path, keep: int):
        self.out, self.keep = out, keep
        self.scores: dict[int, float] = {}  # by step, the higher the better
        self.protected: int | None = None  # a step that is being evaluated: its checkpoint stays
        self.failed = ""  # why the last one could not be written
        self.thread = ThreadPoolExecutor(1, "save")
        self.writing = self.thread.submit(lambda: None)  # the last

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.thread.shutdown()

    async def idle(self) -> None:
        """Wait until the last checkpoint is written."""
        await asyncio.wrap_future(self.writing)

    def save(self, state: dict, *writers: Callable[[Path], None]) -> None:
        """Start to write the checkpoint of a step. A failure is logged, and the checkpoints before it stay.

        Args:
            state: has `step`, and whatever else JSON can hold.
            writers: each writes a part into the folder that it is given.
        """
        self.writing = self.thread.submit(self._save, state, writers)

    def score(self, step: int, figures: dict[str, float], best: str) -> None:
        """Note how good the policy was at a step: the figure named `best` of its evaluation, the higher the better."""
        if best not in figures and not self.scores:
            log.info(f"no checkpoint is marked as the best: `evaluate` gives no {best!r} (`best` of the task)")
        self.scores[step] = float(figures.get(best, math.nan))
        self.protected = None
        self.thread.submit(self._prune)

    def _save(self, state: dict, writers: tuple[Callable[[Path], None], ...]) -> None:
        folder = self.out / "checkpoints" / f"step-{state['step']}"

        def write(to: Path) -> None:
            for writer in writers:
                writer(to)
            (to / "state.json").write_text(json.dumps(state | {"files": file_sizes(to)}))

        try:
            if not folder.is_dir():
                write_atomically(folder, write)
        except Exception as error:
            self.failed = f"{folder} cannot be written ({error})"
            log.info(f"{self.failed}: those before it stay")
        else:
            self.failed = ""
            self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that need not stay, and link `best` to the best."""
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
                if step not in (best, self.protected):
                    with replacing(steps[step]):
                        pass
        except OSError as error:
            log.info(f"checkpoints cannot be removed ({error})")


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, which appears when it is complete, in the place of any before it.

    Raises:
        Exception: it cannot be written; nothing is left of it.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            fsync(path)
        with replacing(folder):
            unfinished.rename(folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, whose old text stays until the new one is complete."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text)
    fsync(unfinished)
    unfinished.replace(path)


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Move a folder, if there is one, out of the way, and remove it afterwards: it never appears half removed."""
    aside = folder.with_name(f"{folder.name}-old{UNFINISHED}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    yield
    shutil.rmtree(aside, ignore_errors=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file of a checkpoint, but of its list."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "state.json"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def by_step(out: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints, the newest first."""
    found = {path.name.removeprefix("step-"): path for path in out.glob("checkpoints/step-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)}


def newest(out: Path) -> tuple[Path, dict] | None:
    """The folder and the state of a run's newest complete checkpoint, or None; damaged ones are logged."""
    for folder in by_step(out).values():
        try:
            state = json.loads((folder / "state.json").read_text())
            if file_sizes(folder) == state["files"]:
                return folder, state
            reason = "a file is missing, or is not as long as it was"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        log.info(f"{folder} is damaged ({reason}): the checkpoint before it is used")
    return None


def clean_up(out: Path, step: int) -> None:
    """Remove unfinished files of a run that was killed, and rename damaged checkpoints: those after `step`."""
    for path in [*out.glob(f"*{UNFINISHED}"), *out.glob(f"checkpoints/*{UNFINISHED}")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for folder in [folder for at, folder in by_step(out).items() if at > step]:
        with replacing(aside := folder.with_name(f"{folder.name}.damaged")):
            folder.rename(aside)


def lock(out: Path) -> IO:
    """Lock a run's folder for this process, until it ends or the returned file is closed.

    Raises:
        ValueError: another run has locked it.
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
