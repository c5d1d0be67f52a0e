"""What every process and thread of ours does first."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Set
from pathlib import Path


def begin(log: Path) -> None:
    """Begin a child process: it ends with the program, leaves signals to it, and prints to a log."""
    threading.Thread(target=_end_with_program, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)


def _end_with_program() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def unname_locks() -> None:
    """Let the locks that libraries make have no names, which would outlive this process."""
    multiprocessing.set_start_method("fork", force=True)


def pin_thread(cores: Set[int]) -> None:
    """Confine this thread, and the threads that torch starts for it, to some cores for good."""
    import torch

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
