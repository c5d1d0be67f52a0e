"""Rewards, guarded: a task's reward may be slow, hang, raise or give nonsense, and search goes on."""

import asyncio
import contextlib
import inspect
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from screen import Failure, say
from searcher import Response

WINDOW = 200  # responses; where the reward fails for more than half of so many, the run ends ...
CALLS = 3  # ... unless fewer calls than this failed: one that fails may have been for hundreds of responses


class RewardError(Failure):
    """The reward fails too often."""


class Scorer:
    """Sets the rewards of responses.

    Args:
        reward: `Task.reward`.
        seconds: that it may take for the responses to one problem.
    """

    def __init__(self, reward: Callable, seconds: float):
        self.reward, self.seconds = reward, seconds
        self.failures = 0  # responses so far whose reward failed
        self.recent: deque[tuple[int, int]] = deque()  # (responses, how many failed) of the last calls
        self.first = ""  # error

    async def __call__(self, problem, responses: list[Response]) -> list[Response]:
        """Set `reward` of the responses that have none: a finite number, or nan where the reward failed.

        Returns:
            The responses that have one now.

        Raises:
            RewardError: it failed for more than half of the last `WINDOW` responses.
        """
        if new := [response for response in responses if math.isnan(response.reward)]:
            rewards = await self.guarded(self.reward, new, problem, new)
            for response, reward in zip(new, rewards or [math.nan] * len(new), strict=True):
                response.reward = self.number(reward)
            self.count(len(new), sum(math.isnan(response.reward) for response in new))
        return [response for response in responses if not math.isnan(response.reward)]

    async def guarded(self, work: Callable, responses: list[Response], *arguments) -> list | None:
        """What `work(*arguments)` gives for the responses, one each; None where it raises or takes too long."""
        call = work if inspect.iscoroutinefunction(work) else in_a_thread(work)
        try:
            async with asyncio.timeout(self.seconds) as limit:
                values = list(await call(*arguments))
            if len(values) != len(responses):
                raise ValueError(f"{len(values)} rewards for {len(responses)} responses")
            return values
        except Failure:
            raise  # is not about these responses
        except Exception as error:
            self.note(f"none within {self.seconds:g} s (--reward-timeout)" if limit.expired() else described(error))
            return None

    def number(self, reward) -> float:
        """The reward as a float; nan where it is no finite number."""
        try:
            number = float(reward)
        except Exception:
            number = math.nan
        if math.isfinite(number):
            return number
        self.note(f"{reward!r:.100} is no finite number")
        return math.nan

    def count(self, responses: int, failed: int) -> None:
        """Note the outcome of a call.

        Raises:
            RewardError: too much has failed.
        """
        self.failures += failed
        self.recent.append((responses, failed))
        while sum(n for n, _ in self.recent) - self.recent[0][0] >= WINDOW:
            self.recent.popleft()
        known, bad = (sum(each) for each in zip(*self.recent, strict=True))
        if known >= WINDOW and bad > known / 2 and sum(failed > 0 for _, failed in self.recent) >= CALLS:
            raise RewardError(
                f"the reward failed for {bad} of the last {known} responses; the first time: {self.first}"
            )

    def note(self, failure: str) -> None:
        """Say what went wrong the first time; then it is only counted."""
        if not self.first:
            self.first = failure
            say(f"a reward failed: {failure}. Such responses are dropped and counted (reward_failures)")


idle: list[SimpleQueue] = []  # of threads, each of which waits for work


def in_a_thread(work: Callable) -> Callable:
    """A plain function as an `async` one. Threads are kept for the next call, which costs less than starting them; one
    that hangs cannot be ended, but does not keep the program from ending."""

    async def call(*arguments):
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        try:
            queue = idle.pop()
        except IndexError:
            queue = SimpleQueue()
            threading.Thread(target=serve, args=(queue,), name="reward", daemon=True).start()
        queue.put((work, arguments, loop, future))
        value, error = await future
        if isinstance(error, Exception) and not isinstance(error, StopIteration):  # that would end this coroutine
            raise error
        if error:
            raise RuntimeError(described(error)) from error
        return value

    return call


def serve(queue: SimpleQueue) -> None:
    """What a thread does: one call after another, the outcome (value, error) to the future."""

    def settle(future: asyncio.Future, outcome: tuple) -> None:
        if not future.done():  # else nobody waits any more
            future.set_result(outcome)

    while True:
        work, arguments, loop, future = queue.get()
        try:
            outcome: tuple = work(*arguments), None
        except BaseException as error:
            outcome = None, error
        idle.append(queue)
        with contextlib.suppress(RuntimeError):  # the run has ended
            loop.call_soon_threadsafe(settle, future, outcome)
        del work, arguments, loop, future, outcome  # not kept while it waits


def described(error: BaseException) -> str:
    """An error in a line, and where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
