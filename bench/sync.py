"""What does a sync cost: how long does generation stand still, and how far is that from a plain copy of the weights?

    python -m bench.sync                        a random Llama of 30M (on a GPU 1.1B): about 4 minutes on 2 cores
    python -m bench.sync --model DIR            another; all settings of tba.py
    python -m bench.sync --task countdown       the embedded model, where what a call costs whatever the size shows
    python -m bench.sync --json                 prints, last, all figures as one JSON object

The engine is full, and one of its sequences is streamed, a token a step. `stall_ms` is how much longer the steps took
between which the engine loaded the staged weights than steps do else; `idle_ms` how long the same call takes while
nothing is in flight. `fill_ms` is the trainer's copy into the staging tensor, `memcpy_ms` a plain copy of as many
bytes, on one core or on the GPU. Times in milliseconds.

over_memcpy         stall_ms / memcpy_ms
"""

import asyncio
import contextlib
import itertools
import statistics
import time

import torch

from bench.runs import parser, table
from bench.search import bare, names
from bench.session import session
from engine import WHOLE
from run import Run, in_thread

SYNCS = 5  # in each repeat


def milliseconds(work) -> float:
    """What a piece of work takes, the GPU's part of it included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


async def sync(run: Run) -> tuple[float, float]:
    """Load the staged weights; when that began and ended."""
    began = time.perf_counter()
    await run.searcher.load_staging()
    return began, time.perf_counter()


async def stalls(run: Run, count: int) -> list[float]:
    """How much longer than the others those steps of a full engine took between which it loaded weights."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    arrivals: list[float] = []
    params = SamplingParams(
        max_tokens=run.config.max_tokens, min_tokens=run.config.max_tokens, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    prompt = tokens_input(run.prompts[0].tokens.tolist())

    async def stream() -> None:
        while True:
            async for _ in run.searcher.engines[0].llm.generate(prompt, params, f"stream {next(names)}", priority=-1):
                arrivals.append(time.perf_counter())

    found = []
    async with bare(run, detokenize=False, extra_args=WHOLE):
        task = asyncio.create_task(stream())
        await seen(arrivals, 20)
        for _ in range(count):
            start = len(arrivals) - 1
            began, ended = await sync(run)
            await seen(arrivals, len(arrivals) + 10)
            times = arrivals[start:]
            gaps = [(b - a, a < ended and b > began) for a, b in itertools.pairwise(times)]
            usual = statistics.median(gap for gap, during in gaps if not during)
            found.append(1000 * sum(gap - usual for gap, during in gaps if during))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return found


async def seen(arrivals: list[float], count: int) -> None:
    """Return when so many have arrived."""
    while len(arrivals) < count:
        await asyncio.sleep(0.001)


async def repeat(run: Run) -> dict[str, float]:
    """Times of each."""
    staging, policy = run.trainer.staging, run.trainer.policy
    elsewhere = torch.empty_like(staging.flat)

    def fill() -> None:
        staging.fill(policy, run.step)
        staging.wait()

    async def timed(work) -> float:
        return statistics.median([await in_thread(run.train_thread, milliseconds, work) for _ in range(SYNCS)])

    figures = {"memcpy_ms": await timed(lambda: elsewhere.copy_(staging.flat)), "fill_ms": await timed(fill)}
    idle = [await sync(run) for _ in range(SYNCS)]
    figures["idle_ms"] = statistics.median(1000 * (ended - began) for began, ended in idle)
    figures["stall_ms"] = statistics.median(await stalls(run, SYNCS))
    return figures | {"over_memcpy": figures["stall_ms"] / figures["memcpy_ms"]}


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    wanted, settings = commands.parse_known_args(arguments)
    size = "1.1B" if torch.cuda.is_available() else "30M"
    lengths = "--task", "bench/lengths_task.py", "--model", size, "--prompt-tokens", "16", "--max-tokens", "60"
    async with session(*([] if "--task" in settings else lengths), *settings) as run:
        print(f"{run.trainer.parameters:,} parameters, {run.trainer.staging.flat.nbytes / 2**20:.1f} MiB of weights")
        repeats = [await repeat(run) for _ in range(wanted.repeats)]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
