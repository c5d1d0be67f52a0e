"""What runs on the nodes of a Ray cluster: the process of an engine, and that of a model that scores."""

import asyncio
import itertools
import pickle
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from search.engine import EngineSettings


class Inbox:
    """What `Worker.loop` reads, with a pipe's `poll` and `recv`: a queue in the same process."""

    def __init__(self):
        self.messages: deque = deque()
        self.there = threading.Semaphore(0)

    def send(self, *message) -> None:
        """Add a message."""
        self.messages.append(message)
        self.there.release()

    def poll(self, seconds: float | None) -> bool:
        """Whether there is a message to receive; None waits for one."""
        return self.there.acquire(blocking=seconds is None)

    def recv(self) -> tuple:
        """The message that `poll` found."""
        return self.messages.popleft()


class EngineHost:
    """An actor: the process of an engine, which has vLLM in a thread (worker.py)."""

    def __init__(self):
        self.inbox, self.calls, self.numbers = Inbox(), {}, itertools.count(1)

    async def start(self, settings: EngineSettings) -> str:
        """Start vLLM; returns the node's address when it can be called."""
        from search.worker import work  # imports vLLM

        self.loop = asyncio.get_running_loop()
        ready = self.calls[0] = self.loop.create_future()
        threading.Thread(target=work, args=(self.inbox, self._send, settings), daemon=True).start()
        await ready
        self.ended = self.calls[0] = self.loop.create_future()
        return ray.util.get_node_ip_address()

    async def wait(self) -> None:
        """Wait until vLLM cannot go on, and raise what it said."""
        await self.ended

    async def call(self, method: str, *arguments) -> bytes:
        """The pickled result of a method of `Worker`. Where this is cancelled, the request is aborted."""
        number = next(self.numbers)
        future = self.calls[number] = self.loop.create_future()
        self.inbox.send(number, method, arguments)
        try:
            return pickle.dumps(await future)  # in half the time that Ray takes for many small arrays
        finally:
            del self.calls[number]
            if future.cancelled():
                self.inbox.send(next(self.numbers), "abort", (number,))

    async def load_weights(self, version: int, handle: dict, flat: np.ndarray) -> None:
        """Load weights [N], which are mapped from the node's object store."""
        await self.call("load_weights", version, handle | {"array": flat})

    def _send(self, message: tuple) -> None:
        self.loop.call_soon_threadsafe(self._answer, *message)

    def _answer(self, number: int, result: Any, error: str | None) -> None:
        future = self.calls.get(number)
        if future and not future.done():
            future.set_exception(RuntimeError(error)) if error else future.set_result(result)


class JudgeHost:
    """An actor: the process of a model that scores (rewards/judges.py)."""

    def __init__(self, judge: Any, device: str):
        judge._load(device)
        self.judge = judge

    def compute(self, texts: Sequence) -> list[np.ndarray]:
        """An array for each text."""
        return self.judge._compute(texts)
