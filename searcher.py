"""The searcher: vLLM engines that share the requests, take new weights, and are replaced when they die.

One request a prompt with n responses, each told of once, no detokenising, and no log-probabilities unless the
objective reads them: then the event loop, which shares its process with the trainer, stays idle. The policy's engines
never read weights from a file: they start with random ones and take the trainer's (weights.py), so that what they
sample from is what is trained.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine import MAX_IN_FLIGHT, WHOLE, Engine, Launcher
from screen import Failure, say

if TYPE_CHECKING:
    from weights import Staging

DEATHS, DEATHS_SECONDS = 3, 600  # engines that are replaced in so many seconds; one more ends the run


@dataclass(slots=True)
class Response:
    """What an engine generated."""

    tokens: np.ndarray  # int32 [T], end-of-sequence token included
    finished: bool  # False: cut off at the length limit
    logprobs: np.ndarray | None  # float32 [T], of its tokens as they were drawn, temperature included; if asked for
    text: str = ""
    reward: float = math.nan
    figures: dict[str, float] = field(default_factory=dict)  # a task's own


@dataclass
class Searcher:
    """Engines that share the requests. Make one by `start`, end it by `shutdown`.

    When an engine dies another is started in its place, with the current weights, and asked for what was in flight.
    """

    devices: Sequence[str]
    temperature: float
    max_tokens: int
    min_tokens: int = 0
    top_p: float = 1.0
    engines: list[Engine] = field(default_factory=list)
    requests: Iterator[int] = field(default_factory=itertools.count)
    staging: "Staging | None" = None  # from which the engines take their weights
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while `staging` is written, or read out of turn
    restarts: int = 0
    _launcher: Launcher | None = None
    _deaths: list[float] = field(default_factory=list)  # when
    _busy: float = 0.0  # seconds, to the moment when last nothing was in flight
    _busy_since: float | None = None

    async def start(
        self,
        model: str,
        max_model_len: int,
        seed: int,
        memory: dict[str, float],
        cores: set[int],
        log: Path,
        load: bool = False,
    ) -> None:
        """Start an engine on each device, side by side; what they print goes to the file `log`.

        Args:
            model: a Hugging Face folder or hub id, for its architecture and tokenizer.
            max_model_len: longest sequence, prompt and response, in tokens.
            seed: of the sampling.
            memory: by device, the share of a GPU's memory that its engine takes.
            cores: the CPU cores of engines on the CPU.
            log: a file.
            load: read the model's weights; else they come through `load_staging`.

        Raises:
            Failure: vLLM gave up; says why.
        """
        self._launcher = Launcher(model, max_model_len, seed, memory, cores, len(self.devices), log, load)
        self.engines = await self._launcher.start(self.devices)

    @property
    def slots(self) -> int:
        """Sequences that all engines together hold in flight."""
        return sum(MAX_IN_FLIGHT[device.split(":")[0]] for device in self.devices)

    @property
    def in_flight(self) -> int:
        """Sequences that all engines together have in flight."""
        return sum(engine.in_flight for engine in self.engines)

    @property
    def busy_seconds(self) -> float:
        """Time so far in which anything was in flight."""
        return self._busy + (time.perf_counter() - self._busy_since if self._busy_since else 0.0)

    async def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        n: int,
        temperature: float | None = None,
        logprobs: bool = False,
        seed: int | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> tuple[list[Response], int]:
        """n responses to a prompt's tokens, on request with log-probabilities, at another temperature (0: greedy) or
        with a seed of their own; and the version of the weights that began them. Calls `ended` as each has ended."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(
            n=n,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            seed=seed,
            logprobs=0 if logprobs else None,  # 0 others beside the token's own
            flat_logprobs=True,
            detokenize=False,
            extra_args=WHOLE,
        )
        tokens, told = np.asarray(prompt).tolist(), 0

        async def ask(engine: Engine):
            nonlocal told
            version, responses = engine.version, []
            # Salted with the version, the prefix cache never serves keys and values of older weights.
            salted = tokens_input(tokens, cache_salt=str(version))
            self._count(engine, n)
            try:
                async for output in engine.llm.generate(salted, params, self._name()):
                    responses += output.outputs
                    self._count(engine, -len(output.outputs))
                    while told < len(responses):  # where an engine died some have been told already
                        told += 1
                        ended()
            finally:
                self._count(engine, len(responses) - n)
            if any(each.finish_reason not in ("stop", "length") for each in responses):
                raise RuntimeError("vLLM cut a response short")
            return sorted(responses, key=lambda each: each.index), version

        responses, version = await self._ask(ask)
        return [
            Response(
                np.array(each.token_ids, dtype=np.int32),
                each.finish_reason != "length",
                np.array(each.logprobs.logprobs, dtype=np.float32) if logprobs else None,
            )
            for each in responses
        ], version

    async def prompt_logprobs(self, tokens: Sequence[int] | np.ndarray) -> list[tuple[Engine, np.ndarray]]:
        """(engine, log-probability of each token but the first [T-1] at temperature 1) of every engine.

        Asked before all that waits, for a sync waits for it.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        tokens = np.asarray(tokens).tolist()

        async def ask(engine: Engine) -> tuple[Engine, np.ndarray]:
            requested = engine.llm.generate(tokens_input(tokens), params, self._name(), priority=-1)
            (output,) = [output async for output in requested]
            rows = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
            return engine, np.array([row[token].logprob for token, row in rows])

        return await asyncio.gather(*(self._ask(ask, engine) for engine in self.engines))

    async def open_staging(self, staging: "Staging") -> None:
        """Let every engine open the trainer's staging tensor."""
        await asyncio.gather(*(engine.call("open_staging", staging.handle) for engine in self.engines))
        self.staging = staging

    async def load_staging(self) -> None:
        """Let every engine take the staged weights, between two of its steps; what is in flight goes on with them."""

        async def load(engine: Engine) -> None:
            await engine.load_staging(self.staging.version)

        await asyncio.gather(*(self._ask(load, engine) for engine in self.engines))

    def shutdown(self) -> None:
        """End the engines and their processes, at once."""
        if self._launcher:
            self._launcher.end()

    async def _ask(self, ask: Callable[[Engine], Awaitable], engine: Engine | None = None):
        """What `ask` gives for an engine, the least busy one unless it is given; where it dies, for the next."""
        engine = engine or min(self.engines, key=lambda each: (each.replacement is not None, each.in_flight))
        while True:
            if engine.replacement:
                engine = await asyncio.shield(engine.replacement)  # others wait for it too
            try:
                return await ask(engine)
            except Exception:
                if not engine.llm.errored:
                    raise
                engine.replacement = engine.replacement or asyncio.create_task(self._replace(engine))

    async def _replace(self, dead: Engine) -> Engine:
        """Start an engine in the place of one that died.

        Raises:
            Failure: too many have died.
        """
        why = "it died"
        while True:
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < DEATHS_SECONDS] + [now]
            if len(self._deaths) > DEATHS:
                raise Failure(
                    f"the engine on {dead.device} is gone ({why}), and {DEATHS} were before it within "
                    f"{DEATHS_SECONDS // 60} minutes; what vLLM printed is in {self._launcher.log}"
                )
            say(f"the engine on {dead.device} is gone ({why}): starting another, to be asked for what was in flight")
            engine = None
            try:
                await dead.died()
                dead.end()
                (engine,) = await self._launcher.start([dead.device])
                if self.staging:
                    async with self.writing:
                        await asyncio.to_thread(self.staging.wait)
                        await engine.call("open_staging", self.staging.handle)
                        await engine.load_staging(self.staging.version)
            except Exception as error:
                why = str(error)
                if engine:
                    engine.end()
            else:
                self.engines[self.engines.index(dead)] = engine
                self.restarts += 1
                say(f"the new engine on {engine.device} is ready")
                return engine

    def _name(self) -> str:
        return str(next(self.requests))

    def _count(self, engine: Engine, change: int) -> None:
        """Note that an engine has so many sequences more in flight."""
        engine.in_flight += change
        if self.in_flight:
            self._busy_since = self._busy_since or time.perf_counter()
        else:
            self._busy, self._busy_since = self.busy_seconds, None
