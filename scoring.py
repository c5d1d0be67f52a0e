"""Rewards, guarded: a task's reward may be slow, hang, raise or give nonsense, and search goes on."""

import asyncio
import contextlib
import inspect
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from log import say
from searcher import Response

WINDOW = 200  # responses; where the reward fails for more than half of so many, the run ends


class RewardError(RuntimeError):
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
        self.recent: deque[bool] = deque(maxlen=WINDOW)  # whether it failed
        self.first = ""  # error

    async def __call__(self, problem, responses: list[Response]) -> list[Response]:
        """Set `reward` of the responses that have none: a finite number, or nan where the reward failed.

        Returns:
            The responses that have one now.

        Raises:
            RewardError: it failed for more than half of the last `WINDOW` responses.
        """
        if new := [response for response in responses if math.isnan(response.reward)]:
            for response, reward in zip(new, await self.rewards(problem, new), strict=True):
                response.reward = self.number(reward)
            failed = [math.isnan(response.reward) for response in new]
            self.failures += sum(failed)
            self.recent.extend(failed)
            if len(self.recent) == WINDOW and sum(self.recent) > WINDOW / 2:
                often = f"the reward failed for {sum(self.recent)} of the last {WINDOW} responses"
                raise RewardError(f"{often}; the first time: {self.first}")
        return [response for response in responses if not math.isnan(response.reward)]

    async def rewards(self, problem, responses: list[Response]) -> Sequence:
        """What the task gives for the responses; nan for all of them where it raises or takes too long."""
        call = self.reward if inspect.iscoroutinefunction(self.reward) else in_thread_of_its_own(self.reward)
        try:
            async with asyncio.timeout(self.seconds) as limit:
                rewards = list(await call(problem, responses))
            if len(rewards) != len(responses):
                raise ValueError(f"{len(rewards)} rewards for {len(responses)} responses")
            return rewards
        except Exception as error:
            self.note(f"none within {self.seconds:g} s (--reward-timeout)" if limit.expired() else described(error))
            return [math.nan] * len(responses)

    def number(self, reward) -> float:
        """The reward as a float; nan where it is no finite number."""
        try:
            number = float(reward)
        except (TypeError, ValueError, RuntimeError):  # the last is a tensor's
            number = math.nan
        if math.isfinite(number):
            return number
        self.note(f"{reward!r:.100} is no finite number")
        return math.nan

    def note(self, failure: str) -> None:
        """Say what went wrong the first time; then it is only counted."""
        if not self.first:
            self.first = failure
            say(f"a reward failed: {failure}. Such responses are dropped and counted (reward_failures)")


def in_thread_of_its_own(work: Callable) -> Callable:
    """A plain function as an `async` one. Its thread cannot be ended, but does not keep the program from ending."""

    async def call(*arguments):
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(setter: Callable, value) -> None:
            if not future.done():  # nobody waits any more
                setter(value)

        def run() -> None:
            try:
                outcome = future.set_result, work(*arguments)
            except BaseException as error:
                outcome = future.set_exception, error
            with contextlib.suppress(RuntimeError):  # the run has ended
                loop.call_soon_threadsafe(settle, *outcome)

        threading.Thread(target=run, name="reward", daemon=True).start()
        return await future

    return call


def described(error: Exception) -> str:
    """An error in a line, and where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
