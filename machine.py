"""Which devices and CPU cores train, and which search."""

import contextlib
import os
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def confined(cores: set[int]) -> Iterator[None]:
    """Confine this thread, and those that it starts meanwhile, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(cores: set[int]) -> None:
    """Confine this thread, and the threads that torch starts for it, to some cores for good."""
    import torch

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def cores() -> tuple[set[int], set[int]]:
    """The CPU cores for training and for search: half of them each, the one core where there is but one."""
    every = sorted(os.sched_getaffinity(0))
    half = (len(every) + 1) // 2
    return set(every[:half]), set(every[half:] or every)


def devices(train: str, search: Sequence[str]) -> tuple[str, list[str]]:
    """Where to train and where to search, "auto" resolved: of several GPUs the first trains and the others search.

    Raises:
        ValueError: a device that is not there.
    """
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if train == "auto":
        train = (gpus or ["cpu"])[0]
    if list(search) == ["auto"]:
        search = [gpu for gpu in gpus if gpu != train] or gpus or ["cpu"]
    for name, device in [("train_device", train), *(("search_devices", device) for device in search)]:
        if device != "cpu" and device not in gpus:
            raise ValueError(f"{name} is {device!r}: this machine has {', '.join(['cpu', *gpus])}")
    if gpus and "cpu" in search:
        raise ValueError("search_devices is 'cpu': with GPUs vLLM is installed for them and searches nowhere else")
    return train, list(search)


def engine_memory(train: str, search: Sequence[str], share: float) -> dict[str, float]:
    """By search device, the share of a GPU's memory that its engine takes: `share`, unless that is 0."""
    return {device: share or (0.4 if device == train else 0.9) for device in search}
