"""The processes of the ranks where several devices train. Rank 0 is the trainer's thread, each other rank a process
that makes its calls (train/sharded.py)."""

import contextlib
import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from config import RunError
from search.engine import context
from search.process import begin, pin_thread, unname_locks

if TYPE_CHECKING:
    from train.sharded import ShardedTrainer


class Ranks:
    """The processes of all ranks but the first, as a context manager.

    Args:
        make: makes a rank's trainer, from its rank, all devices, and the file by which the ranks find each other.
        devices: of all ranks.
        before: is called in each process first.
        cores: CPU cores that the ranks divide among them.
        log: file for what they print.
    """

    def __init__(
        self, make: Callable, devices: Sequence[str], before: Callable[[], object], cores: frozenset[int], log: Path
    ):
        self.make, self.devices, self.before, self.log = make, devices, before, log
        each = max(1, len(cores) // len(devices))
        self.cores = [frozenset(sorted(cores)[i * each :][:each] or cores) for i in range(len(devices))]
        self.reason = ""  # why a rank is gone
        self.gone = threading.Event()

    def __enter__(self) -> "Ranks":
        """Start them."""
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Any] = []
        self.processes = []
        for rank in range(1, len(self.devices)):
            pipe, theirs = context.Pipe()
            arguments = theirs, self.log, self.before, self.cores[rank], self.maker(rank)
            process = context.Process(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        """End them, at once."""
        self.gone.set()
        for process in self.processes:
            process.kill()
            process.join()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.folder.cleanup()

    def maker(self, rank: int) -> Callable:
        """What makes a rank's trainer."""
        return functools.partial(self.make, rank=rank, devices=self.devices, store=f"{self.folder.name}/store")

    def trainer(self) -> "ShardedTrainer":
        """The trainer of rank 0, when all ranks are there."""
        pin_thread(self.cores[0])
        try:
            return self.maker(0)(ranks=self)
        except RuntimeError:
            self.check(seconds=5)
            raise

    def send(self, *call) -> None:
        """Let every rank make a call."""
        self.check(0)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it is gone, which `_watch` says
                pipe.send(call)

    def check(self, seconds: float) -> None:
        """A RunError where a rank is gone, or is found to be within so many seconds."""
        if self.gone.wait(seconds):
            raise RunError(f"a trainer is gone: {self.reason}; what it printed is in {self.log}")

    def _watch(self) -> None:
        first = self.pipes.index(connection.wait(self.pipes)[0])
        device = self.devices[1 + first]
        try:
            said = self.pipes[first].recv()
        except (EOFError, OSError):
            said = "its process ended"
        if not self.gone.is_set():
            self.reason = f"{said} ({device})"
            self.gone.set()
            if device != "cpu" and dist.is_initialized():
                dist.group.WORLD.abort()  # on the CPU the others' calls fail by themselves


def _serve(pipe, log: Path, before: Callable[[], object], cores: frozenset[int], make: Callable) -> None:
    """Make the calls of rank 0 until it ends."""
    begin(log)
    unname_locks()
    pin_thread(cores)
    try:
        before()
        trainer = make()
        while True:
            name, positional, named = pipe.recv()
            getattr(trainer, name)(*positional, **named)
    except EOFError:
        return
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
