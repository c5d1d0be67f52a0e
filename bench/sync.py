"""What does a sync cost: how long does generation stand still, and how far is that from a plain copy of the weights?

    python -m bench.sync                        a random Llama of 30M (on a GPU 1.1B): about 3 minutes on 2 cores
    python -m bench.sync --model DIR            another; all settings of tba.py
    python -m bench.sync --task countdown       the embedded model, where what a call costs whatever the size shows
    python -m bench.sync --json                 prints, last, all figures as one JSON object

Engines answer calls between two of their steps. So where one call follows another each takes a step, and one that loads
the staged weights takes as much longer as generation stands still. All responses of a measurement begin together and
have --max-tokens tokens, so that nothing else happens between these steps. Times in milliseconds, medians over some
syncs in each repeat:

step_ms             a step of a full engine
stall_ms            how much longer two steps take, of which the first waits for a sync
idle_ms             the call that loads the weights while nothing is in flight
fill_ms             the trainer's copy into the staging tensor
memcpy_ms           a plain copy of as many bytes, on one core or on the GPU
over_memcpy         stall_ms / memcpy_ms. (Before engines answered between steps, a step was the time between two tokens
                    of a streamed response: the same quantity.)
syncing             tokens/s while one copy and call follows another, over tokens/s without any
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

import torch

from bench.session import session
from bench.table import parser, table
from search.engine import Engine
from tba import TBA

SYNCS = 5  # in each repeat


def milliseconds(work: Callable) -> float:
    """What a piece of work takes, the GPU's part of it included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


async def call(engine: Engine, method: str, *arguments) -> float:
    """Milliseconds until an engine has answered a call."""
    began = time.perf_counter()
    await engine.call(method, *arguments)
    return 1000 * (time.perf_counter() - began)


async def generate(run: TBA) -> None:
    """As many responses as every engine has slots for, of --max-tokens tokens each."""
    prompt, length = run.prompts[0].tokens.tolist(), run.config.max_tokens

    def request(engine: Engine) -> Awaitable:
        sampling = dict(n=engine.settings.slots, max_tokens=length, min_tokens=length)
        return engine.call("generate", prompt, run.searcher.sampling | sampling)

    await asyncio.gather(*map(request, run.searcher.engines))


@contextlib.asynccontextmanager
async def going_on(run: TBA, work: Coroutine) -> AsyncIterator[None]:
    """Let a coroutine go on during the block, and cancel it."""
    task = run.group.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def stall(run: TBA) -> tuple[float, float]:
    """(a step of the first engine, how much longer two steps take of which the first waits for a sync)"""
    engine, version = run.searcher.engines[0], run.searcher.weights.version
    async with going_on(run, generate(run)):
        _, _, _, *steps = [await call(engine, "running") for _ in range(6)]  # the first ones read the prompts
        with_sync = await call(engine, "load_weights", version) + await call(engine, "running")
    step = statistics.median(steps)
    return step, with_sync - 2 * step


async def repeat(run: TBA) -> dict[str, float]:
    """Times of each."""
    weights, engine = run.searcher.weights, run.searcher.engines[0]
    elsewhere = torch.empty_like(weights.flat)

    def fill() -> None:
        weights.write(run.progress.step, run.trainer.named())
        weights.wait()

    async def copying(work: Callable) -> float:
        return statistics.median([await run.in_trainer(milliseconds, work) for _ in range(SYNCS)])

    async def syncing() -> None:  # without the comparison: a full engine has no place for it until a sequence ends
        while True:
            await run.in_trainer(fill)
            await run.searcher.load_weights()

    async def seconds() -> float:
        began = time.perf_counter()
        await generate(run)
        return time.perf_counter() - began

    figures = {"memcpy_ms": await copying(lambda: elsewhere.copy_(weights.flat)), "fill_ms": await copying(fill)}
    idle = [await call(engine, "load_weights", weights.version) for _ in range(SYNCS)]
    step, stalls = zip(*[await stall(run) for _ in range(SYNCS)], strict=True)
    figures |= {
        name: statistics.median(each) for name, each in (("idle_ms", idle), ("step_ms", step), ("stall_ms", stalls))
    }
    without = await seconds()
    async with going_on(run, syncing()):
        figures["syncing"] = without / await seconds()
    return figures | {"over_memcpy": figures["stall_ms"] / figures["memcpy_ms"]}


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    wanted, settings = commands.parse_known_args(arguments)
    size = "1.1B" if torch.cuda.is_available() else "30M"
    lengths = "--task", "bench/lengths_task.py", "--model", size, "--prompt-tokens", "16", "--max-tokens", "30"
    async with session(*([] if "--task" in settings else lengths), *settings) as run:
        megabytes = run.searcher.weights.flat.nbytes / 2**20
        print(f"{run.trainer.parameters:,} parameters, {megabytes:.1f} MiB of weights")
        repeats = [await repeat(run) for _ in range(wanted.repeats)]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
