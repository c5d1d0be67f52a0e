"""Which devices and CPU cores train and search, and the process that engines are forked from."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver

from search.engine import PRELOAD, context


def on_cluster(word: str) -> tuple[str, int, int] | None:
    """Of a device on a Ray cluster its kind, and how many engines there must be and may be; None for a local one.

    Raises:
        ValueError: says what it must be.

    >>> on_cluster("ray:16"), on_cluster("ray:cpu:2-4"), on_cluster("cuda:1")
    (('cuda', 16, 16), ('cpu', 2, 4), None)
    """
    if word.partition(":")[0] != "ray":
        return None
    found = re.fullmatch(r"ray:(cpu:)?(\d+)(?:-(\d+))?", word, re.ASCII)
    if not found:
        raise ValueError("ray:N or ray:N-M (GPUs), ray:cpu:N or ray:cpu:N-M, as in ray:4-64")
    least, most = int(found[2]), int(found[3] or found[2])
    if not 0 < least <= most:
        raise ValueError("at least 1, and the second number no lower, as in ray:4-64")
    return "cpu" if found[1] else "cuda", least, most


def all_gpus() -> list[str]:
    """The GPUs of this machine."""
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def devices(train: Sequence[str], search: Sequence[str], judges: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The devices that train and those that search: of several GPUs "auto" is the first to train, the others to search.

    Raises:
        ValueError: a device that is not there.
    """
    gpus = all_gpus()
    if list(train) == ["auto"]:
        train = [gpu for gpu in gpus if gpu not in search][:1] or gpus[:1] or ["cpu"]
    remote = [device for device in search if on_cluster(device)]
    search = [device for device in search if device not in remote]
    if search == ["auto"]:
        search = [gpu for gpu in gpus if gpu not in train] or gpus or ["cpu"]
    local = [device for device in judges if not on_cluster(device)]
    for name, some in (("train_devices", train), ("search_devices", search), ("judge_devices", local)):
        for device in some:
            if device != "cpu" and device not in gpus:
                raise ValueError(f"{name} has {device!r}: this machine has {', '.join(['cpu', *gpus])}")
    if gpus and "cpu" in search:
        raise ValueError("search_devices is 'cpu': with GPUs vLLM is installed for them and searches nowhere else")
    return list(train), [*search, *remote]


def cores() -> tuple[frozenset[int], frozenset[int]]:
    """The CPU cores for training and for search: half of them each, the same one where there is but one."""
    every = sorted(os.sched_getaffinity(0))
    half = (len(every) + 1) // 2
    return frozenset(every[:half]), frozenset(every[half:] or every)


@contextlib.contextmanager
def cpu_affinity(cores: frozenset[int]) -> Iterator[None]:
    """Confine this thread, and those that it starts meanwhile, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_fork_server(preload: bool = True) -> None:
    """Start the process that engines are forked from, unless it runs.

    Where engines are on the CPU, it imports vLLM while this process imports torch (`preload`); on GPUs each engine
    imports it by itself, so that nothing can have touched CUDA before the fork. It imports what this process would,
    from whatever folder, and ignores Ctrl-C and SIGTERM, which a terminal sends to all: engines end when this process
    ends them. Call it from the main thread.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONSAFEPATH": "1",
    }
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    devnull, outputs = os.open(os.devnull, os.O_WRONLY), {number: os.dup(number) for number in (1, 2)}
    for number in outputs:  # libraries print while they are imported, and a pipe would stay open as long as it lives
        os.dup2(devnull, number)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        context.set_forkserver_preload(PRELOAD if preload else [])
        forkserver.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, output in outputs.items():
            os.dup2(output, number)
            os.close(output)
        os.close(devnull)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
