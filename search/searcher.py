"""The searcher: a pool of vLLM engines that share the requests, take new weights, and are replaced when they die.

The policy's engines start with random weights and take the trainer's (weights.py), so that what they sample from is the
policy that is trained.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from buffer import Response
from config import RunError
from search.engine import CALL_SECONDS, Engine, EngineDied, EngineSettings

if TYPE_CHECKING:
    from search.weights import StagedWeights

MAX_DEATHS, DEATHS_SECONDS = 3, 600  # engines that are replaced within so many seconds; one more ends the run

log = logging.getLogger("tba")


class Searcher:
    """Engines that share the requests, as an async context manager.

    When an engine dies, another is started in its place with the current weights, and gets what was in flight.

    Args:
        engines: one for each.
        weights: the staging tensor that they take their weights from; None: each loads its model's own.
        sampling: vLLM's settings: temperature, max_tokens, min_tokens, top_p.
    """

    def __init__(self, engines: Sequence[EngineSettings], weights: "StagedWeights | None" = None, **sampling):
        self.weights, self.sampling = weights, sampling
        self.weights_lock = asyncio.Lock()  # held while `weights` is written, or read out of turn
        self.engines = [Engine(each) for each in engines]
        self.remote: list[Any] = []  # engines on other machines, which come and go (remote.py)
        self.restarts = 0
        self._deaths: list[float] = []  # when

    async def __aenter__(self) -> "Searcher":
        """Start the engines, side by side. A RunError says why vLLM gave up."""
        try:
            await asyncio.gather(*(engine.start() for engine in self.engines))
            if self.weights:
                await self._open_weights()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_) -> None:
        """End the engines and their processes, at once."""
        for engine in self.engines:
            if engine.replacement:
                engine.replacement.cancel()
            engine.end()

    @property
    def slots(self) -> int:
        """Sequences that all engines together have in flight at most."""
        return sum(engine.settings.slots for engine in [*self.engines, *self.remote])

    @property
    def in_flight(self) -> int:
        """Responses that were requested and have not come."""
        return sum(engine.in_flight for engine in [*self.engines, *self.remote])

    def gauges(self) -> dict[str, float]:
        """Figures for metrics.jsonl."""
        engines = sum(not engine.dead for engine in [*self.engines, *self.remote])
        return {"engines": engines, "engine_restarts": self.restarts}

    async def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        n: int,
        *,
        temperature: float | None = None,
        logprobs: bool = False,
        seed: int | None = None,
        version: int = 0,
    ) -> list[Response]:
        """n responses to a prompt's tokens [P].

        Args:
            temperature: other than the searcher's; 0: greedy.
            logprobs: note each token's log-probability as it was drawn, temperature included.
            seed: of their sampling.
            version: of the oldest weights that may begin them: remote engines are not waited for in a sync.
        """
        sampling = self.sampling | {"n": n, "seed": seed, "logprobs": 0 if logprobs else None}  # of no other tokens
        if temperature is not None:
            sampling["temperature"] = temperature
        while True:
            engine = await self._least_busy(version)
            engine.in_flight += n
            try:
                return await engine.call("generate", np.asarray(prompt).tolist(), sampling)
            except EngineDied:
                await self._replacement(engine)
            finally:
                engine.in_flight -= n

    async def load_weights(self) -> None:
        """Let every engine load the staged weights between two of its steps; what is in flight goes on with them.

        A RunError where vLLM has them by other names than transformers.
        """
        try:
            await self._all("load_weights", self.weights.version)
        except RuntimeError as error:
            if isinstance(error, RunError):  # no answer
                raise
            raise RunError(f"vLLM cannot load this model's weights as transformers has them: {error!s:.200}") from error

    async def check_agreement(self, probe: np.ndarray, expected: np.ndarray, strict: bool) -> dict[str, float]:
        """Compare engines and trainer by the log-probabilities of the same tokens, the probe [T].

        Args:
            expected: the trainer's, of all tokens but the first [T-1], in nats, at temperature 1.
            strict: refuse what rounding does not explain; an engine's first weights are always held to that.

        Returns:
            `sync_diff_mean` and `sync_diff_max` over the tokens, of the engine that is furthest off, in nats.

        Raises:
            RunError: an engine is further off than `TOLERANCE`; or the policy's own log-probabilities are not finite.
        """
        if not np.isfinite(expected).all():
            raise RunError("the policy's log-probabilities are not finite: it has diverged (a lower --lr may help)")
        for engine, logprobs in await self._all("prompt_logprobs", np.asarray(probe).tolist()):
            self._compare(engine, logprobs, expected, strict)
        mean, largest = zip((0.0, 0.0), *(engine.difference for engine in [*self.engines, *self.remote]), strict=True)
        return {"sync_diff_mean": max(mean), "sync_diff_max": max(largest)}

    def _compare(self, engine: Any, logprobs: np.ndarray, expected: np.ndarray, strict: bool) -> None:
        difference, limit = np.abs(logprobs - expected), self.weights.tolerance
        if (strict or not engine.agreed) and not difference.mean() <= limit:
            raise RunError(
                f"the engine on {engine.settings.device} and the trainer differ by {difference.mean():.2g} nats a "
                f"token on average, above {limit}, after a sync: what it samples from is not what is trained"
            )
        engine.agreed, engine.difference = True, (float(difference.mean()), float(difference.max()))

    async def _least_busy(self, version: int) -> Engine:
        return min(self.engines, key=lambda each: (each.dead, each.in_flight))

    async def _all(self, method: str, *arguments) -> list[tuple[Engine, Any]]:
        """(engine, result) of a call to each engine; where one dies, of its replacement."""

        async def one(engine: Engine) -> tuple[Engine, Any]:
            while True:
                try:
                    return engine, await engine.call(method, *arguments, seconds=CALL_SECONDS)
                except EngineDied:
                    engine = await self._replacement(engine)

        return await asyncio.gather(*map(one, self.engines))

    async def _open_weights(self) -> None:
        """Let the engines open the staging tensor: on the trainer's GPU where all can reach it, else in host memory."""
        try:
            await self._all("open_weights", self.weights.handle)
        except RuntimeError as error:
            if "ipc" not in self.weights.handle:
                raise
            log.info("weights go through host memory: an engine cannot open the trainer's GPU memory (%s)", error)
            self.weights.allocate(share_cuda=False)
            await self._all("open_weights", self.weights.handle)

    async def _replacement(self, dead: Engine) -> Engine:
        """The engine in the place of one that died; requests that wait for it share it."""
        dead.replacement = dead.replacement or asyncio.create_task(self._replace(dead))
        return await asyncio.shield(dead.replacement)

    async def _replace(self, dead: Engine) -> Engine:
        """Start an engine in the place of one that died. A RunError says that too many have died."""
        device, why = dead.settings.device, dead.reason or "it died"
        while True:
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < DEATHS_SECONDS] + [now]
            if len(self._deaths) > MAX_DEATHS:
                raise RunError(
                    f"the engine on {device} is gone ({why}), and {MAX_DEATHS} were before it within "
                    f"{DEATHS_SECONDS // 60} minutes; what vLLM printed is in {dead.settings.log}"
                )
            log.info("the engine on %s is gone (%s): starting another, which gets what was in flight", device, why)
            engine = Engine(dead.settings)
            try:
                dead.end()
                await engine.start()
                if self.weights:
                    async with self.weights_lock:
                        await asyncio.to_thread(self.weights.wait)
                        await engine.call("open_weights", self.weights.handle, seconds=CALL_SECONDS)
                        await engine.call("load_weights", self.weights.version, seconds=CALL_SECONDS)
            except BaseException as error:
                engine.end()
                if not isinstance(error, (RuntimeError, EngineDied)):
                    raise
                why = str(error)
            else:
                self.engines[self.engines.index(dead)] = engine
                self.restarts += 1
                log.info("the new engine on %s is ready", device)
                return engine
