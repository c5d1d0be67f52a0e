"""The parts of a run in this process, started and idle, that a benchmark puts to work a piece at a time."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

from buffer import Group, Response
from run.cli import parse
from run.devices import cpu_affinity
from run.setup import prepare
from tba import TBA, started

ENDLESS = 10**9
QUIET = "--eval-every", "0", "--eval-prompts", "0", "--save-every", "0"  # only search, training and syncs
FREE = "--search-ahead", str(ENDLESS), "--steps", "1"  # neither waits for the other; `train` sets the number of steps


@contextlib.asynccontextmanager
async def session(*settings: str, every_core: bool = False) -> AsyncIterator[TBA]:
    """A run with these settings, its engines started and synced, ended when the block is left.

    Args:
        settings: of tba.py.
        every_core: of the CPU, for search as for training; else each has its own, as in any run.
    """
    with tempfile.TemporaryDirectory() as out:
        setup = prepare(parse([*QUIET, *FREE, *settings, "--out", str(Path(out) / "run")]))
        if every_core:
            setup.train_cores = setup.search_cores = cores = frozenset(os.sched_getaffinity(0))
            setup.engines = [replace(each, cores=cores, threads=len(cores)) for each in setup.engines]
        setup.open()
        async with started(setup) as run, asyncio.TaskGroup() as run.group:
            await run.sync(await run.stage())
            run.metrics.start_clock()
            yield run


@contextlib.asynccontextmanager
async def searching(run: TBA, warm: int | None = None) -> AsyncIterator[None]:
    """Search during the block, which begins when there is enough to train on, and `warm` responses have been stored
    (default: as many as are in flight at a time)."""
    goal = run.progress.responses + (run.searcher.slots if warm is None else warm)
    with cpu_affinity(run.setup.loop_cores):
        task = run.group.create_task(run.search())
        try:
            await run.until(lambda: run.progress.responses >= goal and run.primed())
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            run.sampler.in_flight.clear()


async def search(run: TBA, responses: int) -> float:
    """Seconds until so many more responses are stored, inside of `searching`."""
    began, before = time.perf_counter(), run.progress.responses
    await run.until(lambda: run.progress.responses >= before + responses)
    return (time.perf_counter() - began) * responses / (run.progress.responses - before)


async def train(run: TBA, updates: int) -> float:
    """Seconds that so many updates take, with the syncs that they start."""
    run.config = replace(run.config, steps=run.progress.step + updates)
    began = time.perf_counter()
    await run.train()
    seconds = time.perf_counter() - began
    await asyncio.wait({run.syncing})
    return seconds


@contextlib.asynccontextmanager
async def training(run: TBA) -> AsyncIterator[None]:
    """Update after update during the block, inside of `searching`."""
    run.config = replace(run.config, steps=ENDLESS)
    task = run.group.create_task(run.train())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await asyncio.wait({run.syncing})


class Batches:
    """The batches of some updates, to train on them again: the same groups, the same of them new to the reference."""

    def __init__(self):
        self.batches: list[list[Group]] = []
        self.new: list[list[Response]] = []  # of each batch, those that the reference had to score

    @contextlib.contextmanager
    def recorded(self, run: TBA) -> Iterator[None]:
        """Note what is sampled during the block."""

        def sample(*arguments) -> list[Group]:
            groups, version = type(run.buffer).sample(run.buffer, *arguments), run.trainer.ref_version
            responses = {id(response): response for group in groups for response in group.responses}.values()
            self.batches.append(groups)
            self.new.append([r for r in responses if r.ref_logprobs is None or r.ref_version != version])
            return groups

        with _sampling(run, sample):
            yield

    @contextlib.contextmanager
    def again(self, run: TBA) -> Iterator[None]:
        """Let the same be sampled during the block, in the same order."""
        batches = iter(zip(self.batches, self.new, strict=True))

        def sample(*_) -> list[Group]:
            groups, new = next(batches)
            for response in new:
                response.ref_logprobs = None
            return groups

        with _sampling(run, sample):
            yield


@contextlib.contextmanager
def _sampling(run: TBA, sample: Callable) -> Iterator[None]:
    vars(run.buffer)["sample"] = sample  # in front of the class's
    try:
        yield
    finally:
        del vars(run.buffer)["sample"]
