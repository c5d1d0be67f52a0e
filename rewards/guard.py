"""Rewards under guard: a task's reward may be slow, hang, raise or return nonsense, and search goes on."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable

from buffer import Response
from config import Config, RunError

WINDOW, MIN_CALLS = 200, 3  # a run ends when most of the last WINDOW responses failed, in MIN_CALLS calls or more

log = logging.getLogger("tba")


class RewardError(RunError):
    """The reward fails too often."""


class Rewards:
    """Sets the rewards of responses; drops and counts those whose reward failed.

    Args:
        task: its `reward` and, where the buffer compares responses by it (`near_duplicates`), its `embed` are called.
        tokenizer: decodes the responses.
        config: `reward_timeout`, `reward_concurrency`, `near_duplicates`.
    """

    def __init__(self, task, tokenizer, config: Config):
        self.task, self.tokenizer, self.timeout = task, tokenizer, config.reward_timeout
        self.embeds = config.near_duplicates == "cosine"
        self.semaphore = asyncio.Semaphore(config.reward_concurrency)
        self.waiting = 0  # calls that wait for the semaphore or are being scored
        self.failures = 0  # responses so far whose reward failed
        self.recent: deque[tuple[int, int]] = deque()  # (responses, failures) of the last calls
        self.first_failure = ""

    async def __call__(self, problem, responses: list[Response]) -> list[Response]:
        """Set `text` of the responses, `reward` of those without one, and `embedding` where it is needed.

        Returns:
            The responses that have all that now. A reward that failed stays nan.

        Raises:
            RewardError: more than half of the last `WINDOW` responses failed.
        """
        self.waiting += 1
        try:
            async with self.semaphore:
                return await self.score(problem, responses)
        finally:
            self.waiting -= 1

    async def score(self, problem, responses: list[Response]) -> list[Response]:
        """The same, without waiting for others."""
        texts = self.tokenizer.batch_decode([each.tokens for each in responses], skip_special_tokens=True)
        for response, text in zip(responses, texts, strict=True):
            response.text = text
        unscored = [response for response in responses if math.isnan(response.reward)]
        if unscored:
            rewards = await self.call("rewards", self.task.reward, unscored, problem, unscored)
            for response, reward in zip(unscored, rewards or [math.nan] * len(unscored), strict=True):
                response.reward = self.to_float(reward)
        usable = [response for response in responses if not math.isnan(response.reward)]
        if usable and self.embeds:
            embeddings = await self.call("embeddings", self.task.embed, usable, usable) or []
            usable = usable[: len(embeddings)]  # all of them or none
            for response, embedding in zip(usable, embeddings, strict=True):
                response.embedding = embedding
        if attempted := len(responses if self.embeds else unscored):
            self.count(attempted, len(responses) - len(usable))
        return usable

    async def call(self, what: str, work: Callable, responses: list[Response], *arguments) -> list | None:
        """The values of `work(*arguments)`, one for each response; None where it raises or takes too long."""
        try:
            async with asyncio.timeout(self.timeout) as limit:
                coroutine = inspect.iscoroutinefunction(work)
                values = list(await (work(*arguments) if coroutine else in_daemon_thread(work, *arguments)))
            if len(values) != len(responses):
                raise ValueError(f"{len(values)} {what} for {len(responses)} responses")
            return values
        except RunError:
            raise  # is not about these responses
        except Exception as error:
            late = f"none within {self.timeout:g} s (--reward-timeout)"
            self.warn_once(late if limit.expired() else described(error))
            return None

    def to_float(self, reward) -> float:
        """The reward as a float; nan where it is no finite number."""
        with contextlib.suppress(Exception):
            if math.isfinite(value := float(reward)):
                return value
        self.warn_once(f"{reward!r:.100} is no finite number")
        return math.nan

    def count(self, responses: int, failed: int) -> None:
        """Add a call to the last ones, which together have at least `WINDOW` responses.

        Raises:
            RewardError: too many of them failed.
        """
        self.failures += failed
        self.recent.append((responses, failed))
        while sum(n for n, _ in self.recent) - self.recent[0][0] >= WINDOW:
            self.recent.popleft()
        total, bad = map(sum, zip(*self.recent, strict=True))
        # A single failure may have cost hundreds of responses.
        if total >= WINDOW and bad > total / 2 and sum(failed > 0 for _, failed in self.recent) >= MIN_CALLS:
            raise RewardError(
                f"the reward failed for {bad} of the last {total} responses; the first time: {self.first_failure}"
            )

    def warn_once(self, failure: str) -> None:
        """Log the first failure; later ones are only counted."""
        if not self.first_failure:
            self.first_failure = failure
            log.info(f"a reward failed: {failure}. Such responses are dropped and counted (reward_failures)")

    def gauges(self) -> dict[str, float]:
        """Metrics of this part."""
        return {"reward_failures": self.failures}


async def in_daemon_thread(work: Callable, *arguments):
    """The result of a plain function, run in a thread. One that hangs does not keep the program from ending."""
    outcome = concurrent.futures.Future[tuple]()
    outcome.set_running_or_notify_cancel()  # a timeout ends the waiting, not the thread, which still sets its result

    def run() -> None:
        try:
            outcome.set_result((work(*arguments), None))
        except BaseException as error:
            outcome.set_result((None, error))

    threading.Thread(target=run, name="reward", daemon=True).start()
    value, error = await asyncio.wrap_future(outcome)
    if isinstance(error, Exception) and not isinstance(error, StopIteration):  # which would end this coroutine
        raise error
    if error:
        raise RuntimeError(described(error)) from error
    return value


def described(error: BaseException) -> str:
    """An error in a line, and where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
