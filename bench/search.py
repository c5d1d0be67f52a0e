"""What is left of vLLM's speed where it is asked through the searcher, with rewards and buffer behind it? Countdown.

    python -m bench.search                      5 repeats of 5 seconds each way: about 3 minutes on 2 cores
    python -m bench.search --task gsm8k --model DIR    another task or model: all settings of tba.py
    python -m bench.search --json               prints, last, all figures as one JSON object

Each repeat asks the same engines in turn, with the same problems and sampling: by vLLM's own `generate` with the
settings that cost it least, twice as many sequences as fit in flight (`bare`), by the run's search, and by search while
the trainer updates and publishes on its own cores or GPU. All in generated tokens/s once the engines are full. They
have worker.py's scheduler in all of them, so that `bare` too is told of a response once; `vllm_defaults` is told of
each token. Where all responses are of a length they end together: then a measurement should take many times as long
as one of them.

searcher            search / bare
beside_training     search beside training / bare
vllm_defaults       vLLM's own with its defaults (text made, each token told as it comes) / bare
filled              share of the sequences that the engines can have in flight which the searcher has, during search
loop, loop_beside   cores that the event loop takes during search, alone and beside training
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator

from bench.runs import parser, table
from bench.session import searching, session, training
from engine import WHOLE
from run import Run


async def rate(run: Run, seconds: float, tokens: Callable[[], int]) -> tuple[float, float, float]:
    """(tokens/s, cores that this thread takes, share of the engines' slots that the searcher fills) for so long."""
    before, worked, began, filled = tokens(), time.thread_time(), time.perf_counter(), []
    while (passed := time.perf_counter() - began) < seconds:
        await asyncio.sleep(0.02)
        filled.append(run.searcher.in_flight / run.searcher.slots)
    return (tokens() - before) / passed, (time.thread_time() - worked) / passed, sum(filled) / len(filled)


names = itertools.count()  # of requests, never the same twice


@contextlib.asynccontextmanager
async def bare(run: Run, **settings) -> AsyncIterator[Callable[[], int]]:
    """vLLM's own `generate` by itself, kept full; gives a function that tells how many tokens it has generated."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    config, n, tokens, responses = run.config, run.config.search_responses, 0, 0
    params = SamplingParams(
        n=n, temperature=config.temperature, max_tokens=config.max_tokens, min_tokens=config.min_tokens, **settings
    )
    engines = itertools.cycle(run.searcher.engines)

    async def ask() -> None:
        nonlocal tokens, responses
        for problem in run.order:
            prompt = tokens_input(run.prompts[problem].tokens.tolist())
            async for output in next(engines).llm.generate(prompt, params, f"bare {next(names)}"):
                ended = [each for each in output.outputs if each.finish_reason]
                tokens += sum(len(each.token_ids) for each in ended)
                responses += len(ended)
            run.order.done(problem)

    tasks = [asyncio.create_task(ask()) for _ in range(max(1, 2 * run.searcher.slots // n))]  # some of them wait
    try:
        while responses < run.searcher.slots:
            await asyncio.sleep(0.002)
        yield lambda: tokens
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@contextlib.contextmanager
def counted(run: Run) -> Iterator[Callable[[], int]]:
    """Gives a function that tells how many tokens the run's search has been given, of what it asks for from here on."""
    generate, tokens = run.searcher.generate, 0

    async def counting(*arguments, **settings):
        nonlocal tokens
        responses, version = await generate(*arguments, **settings)
        tokens += sum(len(response.tokens) for response in responses)
        return responses, version

    vars(run.searcher)["generate"] = counting  # in front of the class's
    try:
        yield lambda: tokens
    finally:
        del vars(run.searcher)["generate"]


async def repeat(run: Run, seconds: float) -> dict[str, float]:
    """Generated tokens/s, each way, and what of it is left."""
    async with bare(run, detokenize=False, extra_args=WHOLE) as tokens:
        fastest, *_ = await rate(run, seconds, tokens)
    with counted(run) as tokens:
        async with searching(run):
            search, loop, filled = await rate(run, seconds, tokens)
            async with training(run):
                beside, loop_beside, _ = await rate(run, seconds, tokens)
    async with bare(run) as tokens:
        defaults, *_ = await rate(run, seconds, tokens)
    return {
        "bare": fastest,
        "search": search,
        "beside": beside,
        "searcher": search / fastest,
        "beside_training": beside / fastest,
        "vllm_defaults": defaults / fastest,
        "filled": filled,
        "loop": loop,
        "loop_beside": loop_beside,
    }


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    wanted, settings = commands.parse_known_args(arguments)
    async with session(*settings) as run:
        async with searching(run):  # warm
            pass
        repeats = [await repeat(run, wanted.seconds) for _ in range(wanted.repeats)]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
