"""A vLLM engine as this process sees it: a process of ours (worker.py), a pipe, and a future for each call.

An engine is `start`, `call` and `end`. Every pending call fails with `EngineDied` when its process ends. Whatever has
these three can stand in its place: an actor on another machine, say.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import RunError

MAX_NUM_SEQS = {"cuda": 512, "cpu": 256}  # sequences in flight at most: on CUDA the captured graphs end there
CALL_SECONDS = 300  # for an engine to answer a call that no generation delays
PRELOAD = ["search.worker", "vllm.v1.worker.cpu_worker"]  # imported once, before engines are forked

context = multiprocessing.get_context("forkserver")


class EngineDied(Exception):
    """The engine's process has ended."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is started."""

    device: str  # "cpu", or "cuda:1"
    model: str  # a Hugging Face folder or hub id, for its architecture and tokenizer
    max_model_len: int  # longest sequence, prompt and response, in tokens
    seed: int  # of the sampling
    log: Path  # to which goes what vLLM prints
    max_num_seqs: int = 0  # sequences in flight at a time; 0: the most that its kind of device takes
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory
    cores: frozenset[int] = frozenset()  # CPU cores of an engine on the CPU
    threads: int = 1  # with which it computes on them
    load_weights: bool = False  # load the model's own weights; else `Searcher.load_weights` brings them
    kv_cache_memory_bytes: int = 2**30  # of keys and values, on the CPU

    @property
    def slots(self) -> int:
        """Sequences in flight at a time."""
        return self.max_num_seqs or MAX_NUM_SEQS[self.device.split(":")[0]]


class Engine:
    """An engine. `start` it, `call` a method of its `Worker`, `end` it."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.in_flight = 0  # responses that were requested of it and have not come
        self.agreed = False  # with the trainer, once
        self.difference = 0.0, 0.0  # from it after the last sync, mean and largest, in nats a token
        self.replacement: asyncio.Task | None = None  # under way since it died
        self.dead = False
        self.reason = ""  # why it died, where it said so
        self.pipe, self._theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self._theirs, settings), name="engine", daemon=True)
        self._calls: dict[int, asyncio.Future] = {}
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Start the process, and wait until vLLM can be called. A RunError says why it cannot."""
        loop = asyncio.get_running_loop()
        ready = self._calls[next(self._numbers)] = loop.create_future()
        await asyncio.to_thread(self._launch)  # waits for the fork server's imports
        loop.add_reader(self.pipe, self._receive)
        loop.add_reader(self.process.sentinel, self._died)
        try:
            await ready
        except (EngineDied, RuntimeError) as error:
            text, where = " ".join(str(error).split()), f"all that it printed is in {self.settings.log}"
            helps = " (--max-tokens, --gpu-memory-utilization)" if "memory" in text.lower() else ""
            raise RunError(f"vLLM gave up on {self.settings.device}: {text}{helps}; {where}") from error
        finally:
            self._calls.clear()

    async def call(self, method: str, *arguments, seconds: float | None = None) -> Any:
        """The result of a method of `Worker`. Where this is cancelled, the request is aborted.

        Raises:
            EngineDied: the process has ended.
            RuntimeError: the method raised; or, a RunError, no answer came within `seconds`.
        """
        if self.dead:
            raise EngineDied("it died")
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(number, method, arguments)
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            device = self.settings.device
            raise RunError(f"the engine on {device} lives, but has not answered for {seconds:.0f} s") from None
        finally:
            del self._calls[number]
            if future.cancelled() and not self.dead:
                self._send(next(self._numbers), "abort", (number,))

    def end(self) -> None:
        """End the process, at once."""
        self._died()
        if self.process.pid:
            self.process.kill()
            self.process.join()

    def _launch(self) -> None:
        self.process.start()
        self._theirs.close()
        if self.dead:  # ended meanwhile
            self.process.kill()

    def _send(self, *message) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            self._died()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                number, result, error = self.pipe.recv()
                future = self._calls.get(number)
                if future is None or future.done():
                    self.reason = error if number == 0 else self.reason
                elif error:
                    future.set_exception(RuntimeError(error))
                else:
                    future.set_result(result)
            return
        self._died()

    def _died(self) -> None:
        if self.dead:
            return
        self.dead = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.pipe)
        if self.process.pid:
            loop.remove_reader(self.process.sentinel)
            self._receive()  # what it said before
        self.pipe.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDied(f"it died{': ' * bool(self.reason)}{self.reason}"))


def _serve(pipe, settings: EngineSettings) -> None:
    from search.worker import serve  # imports vLLM, which this process never does

    serve(pipe, settings)
