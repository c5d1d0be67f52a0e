"""What is left of vLLM's speed where it is called through the searcher, with rewards and buffer behind it? Countdown.

    python -m bench.search                      5 repeats of 5 seconds each way: about 3 minutes on 2 cores
    python -m bench.search --task gsm8k --model DIR    another task or model: all settings of tba.py
    python -m bench.search --json               prints, last, all figures as one JSON object

Each repeat generates with the same weights, problems and sampling in turn: by vLLM's own engine in a process of its
own, with nothing of ours around it and the settings that cost it least (`bare`, see vllm_alone.py); by the run's
search; and by search while the trainer updates and syncs on its own cores or GPU. All in generated tokens/s once the
engines are full. Both have the same arguments, those of search/worker.py. Where all responses are of a length they end
together: then a measurement should take many times as long as one of them. On a GPU each engine takes 0.25 of its
memory, since there are two on each, unless --gpu-memory-utilization says otherwise.

searcher            search / bare
beside_training     search beside training / bare
vllm_defaults       vLLM's own with its default outputs (text is made, each token returned as it comes) / bare
filled              share of the sequences that engines can have in flight which they have, during search
loop, loop_beside   cores that the event loop takes during search, alone and beside training
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import torch

from bench.session import searching, session, training
from bench.table import parser, table
from search.engine import EngineSettings, context
from tba import TBA

PROMPTS = 2_000  # at most, for vLLM alone


def _serve(pipe, settings: EngineSettings) -> None:
    from bench.vllm_alone import serve  # imports vLLM, which this process never does

    serve(pipe, settings)


class Alone:
    """vLLM's own engines, each in a process of its own, in the place of a run's."""

    def __init__(self, run: TBA):
        self.run, self.pipes = run, []
        for settings in run.setup.engines:
            pipe, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, settings), daemon=True).start()
            theirs.close()
            self.pipes.append(pipe)
        self.results()
        self.call("open_weights", run.searcher.weights.handle)

    def results(self) -> list[Any]:
        """The result of the last call of each.

        Raises:
            RuntimeError: it failed; says what.
        """
        answers = [pipe.recv() for pipe in self.pipes]
        for _, _, error in answers:
            if error:
                raise RuntimeError(f"vLLM gave up: {error}")
        return [result for _, result, _ in answers]

    def call(self, method: str, *arguments) -> list[Any]:
        """The result of a method of `vllm_alone.Alone` of each."""
        for pipe in self.pipes:
            pipe.send((1, method, arguments))
        return self.results()

    async def rate(self, seconds: float, final: bool, **sampling) -> float:
        """Generated tokens/s of all together, with the weights that the run has staged."""
        config, prompts = self.run.config, self.run.prompts
        sampling |= dict(
            n=config.search_responses,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            min_tokens=config.min_tokens,
        )
        some = [prompt.tokens.tolist() for prompt in random.sample(prompts, min(PROMPTS, len(prompts)))]
        await asyncio.to_thread(self.call, "load_weights", self.run.searcher.weights.version)
        return sum(await asyncio.to_thread(self.call, "rate", some, sampling, final, seconds))


@contextlib.asynccontextmanager
async def vllm_alone(run: TBA) -> AsyncIterator[Alone]:
    """vLLM's own engines, which end with the block."""
    alone = await asyncio.to_thread(Alone, run)
    try:
        yield alone
    finally:
        for pipe in alone.pipes:
            pipe.close()  # which ends them


@contextlib.contextmanager
def counted(run: TBA) -> Iterator[Callable[[], int]]:
    """Yields a function that returns how many tokens `Searcher.generate` has returned, of calls from here on."""
    generate, tokens = run.searcher.generate, 0

    async def counting(*arguments, **settings):
        nonlocal tokens
        responses = await generate(*arguments, **settings)
        tokens += sum(len(response.tokens) for response in responses)
        return responses

    vars(run.searcher)["generate"] = counting  # in front of the class's
    try:
        yield lambda: tokens
    finally:
        del vars(run.searcher)["generate"]


async def rate(run: TBA, seconds: float, tokens: Callable[[], int]) -> tuple[float, float, float]:
    """(tokens/s, cores that this thread takes, share of the engines' slots that are filled) for so long."""
    before, worked, began, filled = tokens(), time.thread_time(), time.perf_counter(), []
    while (passed := time.perf_counter() - began) < seconds:
        await asyncio.sleep(0.1)
        running = await asyncio.gather(*(engine.call("running") for engine in run.searcher.engines))
        filled.append(sum(running) / run.searcher.slots)
    return (tokens() - before) / passed, (time.thread_time() - worked) / passed, sum(filled) / len(filled)


async def repeat(run: TBA, alone: Alone, seconds: float) -> dict[str, float]:
    """Generated tokens/s, each way, and what is left of `bare`."""
    bare = await alone.rate(seconds, final=True, detokenize=False)
    with counted(run) as tokens:
        async with searching(run):
            search, loop, filled = await rate(run, seconds, tokens)
            async with training(run):
                beside, loop_beside, _ = await rate(run, seconds, tokens)
    defaults = await alone.rate(seconds, final=False)
    return {
        "bare": bare,
        "search": search,
        "beside": beside,
        "searcher": search / bare,
        "beside_training": beside / bare,
        "vllm_defaults": defaults / bare,
        "filled": filled,
        "loop": loop,
        "loop_beside": loop_beside,
    }


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    wanted, settings = commands.parse_known_args(arguments)
    share = ["--gpu-memory-utilization", "0.25"] if torch.cuda.is_available() else []
    async with session(*share, *settings) as run, vllm_alone(run) as alone:
        async with searching(run):  # warm
            pass
        repeats = [await repeat(run, alone, wanted.seconds) for _ in range(wanted.repeats)]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
