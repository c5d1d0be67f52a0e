"""A run of the main job in this process, started and idle, that a benchmark puts to work a piece at a time."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from buffer import Group
from config import parse
from machine import confined, pin
from run import Run

ENDLESS = 10**9
QUIET = "--eval-every", "0", "--eval-prompts", "0", "--save-every", "0"  # nothing but search, training and sync
FREE = "--search-ahead", str(ENDLESS), "--steps", "1"  # neither waits for the other; `train` says how many steps


@contextlib.asynccontextmanager
async def session(*settings: str, every_core: bool = False) -> AsyncIterator[Run]:
    """A run with these settings, its engines started, ended when the block is left.

    Args:
        every_core: of a CPU, for search as for training; else each has its own, as the main job gives them out.
    """
    with tempfile.TemporaryDirectory() as out:
        run = Run(parse([*QUIET, *FREE, *settings, "--out", str(Path(out) / "run")]))
        if every_core:
            run.train_cores = run.search_cores = os.sched_getaffinity(0)
            run.train_thread = ThreadPoolExecutor(1, "train", pin, (run.train_cores,))
        run.open()
        try:
            await run.start()
            run.log.start_clock()
            yield run
        finally:
            run.end()


@contextlib.asynccontextmanager
async def searching(run: Run, warm: int | None = None) -> AsyncIterator[None]:
    """Search and sync, going on as long as the block; it begins once so many responses are found (default: as many as
    are in flight at a time), and there are enough to train on."""
    goal = run.searched + (run.searcher.slots if warm is None else warm)
    with confined(run.loop_cores):
        tasks = [asyncio.create_task(run.search()), asyncio.create_task(run.sync())]
        try:
            while run.searched < goal or not run.primed.is_set():
                await asyncio.sleep(0.002)
                for task in tasks:
                    if task.done():
                        task.result()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            run.synced.set()


async def search(run: Run, responses: int) -> float:
    """Seconds until so many responses more are in the buffer, inside of `searching`."""
    began, before = time.perf_counter(), run.searched
    while run.searched < before + responses:
        await asyncio.sleep(0.002)
    return (time.perf_counter() - began) * responses / (run.searched - before)


async def train(run: Run, updates: int) -> float:
    """Seconds that so many updates take."""
    run.config = replace(run.config, steps=run.step + updates)
    began = time.perf_counter()
    await run.train()
    return time.perf_counter() - began


@contextlib.asynccontextmanager
async def training(run: Run) -> AsyncIterator[None]:
    """Updates, going on as long as the block, inside of `searching`."""
    run.config = replace(run.config, steps=ENDLESS)
    task = asyncio.create_task(run.train())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


class Batches:
    """What a run was trained on, to train on it once more: the same groups, the same of them new to the reference."""

    def __init__(self):
        self.batches: list[list[Group]] = []
        self.new: list[list] = []  # responses of each batch that had to be scored

    @contextlib.contextmanager
    def recorded(self, run: Run):
        """Note what is sampled."""

        def sample(*arguments) -> list[Group]:
            groups, version = type(run.buffer).sample(run.buffer, *arguments), run.trainer.ref_version
            responses = {id(response): response for group in groups for response in group.responses}.values()
            self.batches.append(groups)
            self.new.append([r for r in responses if r.ref_logprobs is None or r.ref_version != version])
            return groups

        with _sampling(run, sample):
            yield

    @contextlib.contextmanager
    def again(self, run: Run):
        """Let the same be sampled, in the same order."""
        batches = iter(zip(self.batches, self.new, strict=True))

        def sample(*_) -> list[Group]:
            groups, new = next(batches)
            for response in new:
                response.ref_logprobs = None
            return groups

        with _sampling(run, sample):
            run.primed.set()
            yield


@contextlib.contextmanager
def _sampling(run: Run, sample: Callable):
    vars(run.buffer)["sample"] = sample  # in front of the class's
    try:
        yield
    finally:
        del vars(run.buffer)["sample"]
