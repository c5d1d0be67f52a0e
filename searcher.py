"""The searcher: vLLM engines that generate responses and take new weights.

One request a prompt with n responses, its final output only, no detokenising, and no log-probabilities unless the
objective reads them: then the event loop, which shares its process with the trainer, stays idle. The policy's engines
never read weights from a file: they start with random ones and take the trainer's (weights.py), so that what they
sample from is what is trained.
"""

import asyncio
import contextlib
import ctypes
import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_IN_FLIGHT = {"cuda": 512, "cpu": 256}  # sequences of an engine: on CUDA the captured graphs end there

RPC_SECONDS = 300  # an engine that dies during a call never answers it


@dataclass(slots=True)
class Response:
    """What an engine generated."""

    tokens: np.ndarray  # int32 [T], end-of-sequence token included
    finished: bool  # False: cut off at the length limit
    logprobs: np.ndarray | None  # float32 [T], of its tokens as they were drawn, temperature included; if asked for
    text: str = ""
    reward: float = math.nan
    figures: dict[str, float] = field(default_factory=dict)  # a task's own


@dataclass(slots=True)
class Engine:
    """A vLLM engine, and how many sequences it has in flight."""

    device: str
    llm: object  # vllm.v1.engine.async_llm.AsyncLLM
    in_flight: int = 0
    version: int = 0  # of its weights


@dataclass
class Searcher:
    """Engines that share the requests. Make one by `start`, end it by `shutdown`."""

    devices: Sequence[str]
    temperature: float
    max_tokens: int
    min_tokens: int = 0
    top_p: float = 1.0
    engines: list[Engine] = field(default_factory=list)
    requests: Iterator[int] = field(default_factory=itertools.count)
    _starts: list[Future] = field(default_factory=list)  # of the engines
    _ending: bool = False
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
        """
        self._threads = ThreadPoolExecutor(len(self.devices))  # kept: an engine ends with the thread that started it
        with _environment(cores if "cpu" in self.devices else None, len(self.devices)), _output_to(log):
            self._starts = [
                self._threads.submit(
                    self._start_engine, device, model, max_model_len, seed + i, memory.get(device), load
                )
                for i, device in enumerate(self.devices)
            ]
            await asyncio.gather(*map(asyncio.wrap_future, self._starts))
        await self._call_all("belong")

    @property
    def slots(self) -> int:
        """Sequences that all engines together hold in flight."""
        return sum(MAX_IN_FLIGHT[device.split(":")[0]] for device in self.devices)

    @property
    def busy_seconds(self) -> float:
        """Time so far in which anything was in flight."""
        return self._busy + (time.perf_counter() - self._busy_since if self._busy_since else 0.0)

    async def generate(
        self, prompt: Sequence[int], n: int, temperature: float | None = None, logprobs: bool = False
    ) -> tuple[list[Response], int]:
        """n responses to a prompt's tokens, on request with log-probabilities or at another temperature (0: greedy),
        and the version of the weights that began them."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = min(self.engines, key=lambda engine: engine.in_flight)
        version = engine.version
        params = SamplingParams(
            n=n,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            logprobs=0 if logprobs else None,  # 0 others beside the token's own
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # Salted with the version, the prefix cache never serves keys and values of older weights.
        prompt = tokens_input(np.asarray(prompt).tolist(), cache_salt=str(version))
        with self._in_flight(engine, n):
            output = await self._request(engine, prompt, params, priority=0)
        return [
            Response(
                np.array(each.token_ids, dtype=np.int32),
                each.finish_reason != "length",
                np.array(each.logprobs.logprobs, dtype=np.float32) if logprobs else None,
            )
            for each in output.outputs
        ], version

    async def prompt_logprobs(self, tokens: Sequence[int]) -> list[tuple[str, np.ndarray]]:
        """(device, log-probability of each token but the first [T-1] at temperature 1) of every engine.

        Asked before all that waits, for a sync waits for it.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        tokens = np.asarray(tokens).tolist()

        async def ask(engine: Engine) -> tuple[str, np.ndarray]:
            output = await self._request(engine, tokens_input(tokens), params, priority=-1)
            rows = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
            return engine.device, np.array([row[token].logprob for token, row in rows])

        return await asyncio.gather(*map(ask, self.engines))

    async def open_staging(self, handle: dict) -> None:
        """Let every engine open the trainer's staging tensor."""
        await self._call_all("open_staging", handle)

    async def load_staging(self, version: int) -> None:
        """Let every engine take the staged weights, between two of its steps; what is in flight goes on with them."""

        async def load(engine: Engine) -> None:
            async with asyncio.timeout(RPC_SECONDS):  # not wait_for, which would send the call a turn of the loop later
                engine.version = version  # what is sent after the call is begun after it
                await engine.llm.collective_rpc("load_staging")

        await asyncio.gather(*map(load, self.engines))

    def shutdown(self) -> None:
        """End the engines and their processes, at once."""
        self._ending = True
        while wait(self._starts, timeout=0.1).not_done:
            for starting in multiprocessing.active_children():
                starting.kill()
        for engine in self.engines:
            engine.llm.shutdown(timeout=0)
            engine.llm = None  # or it is shut down once more when the interpreter has gone
        self._threads.shutdown()

    def _start_engine(
        self, device: str, model: str, max_model_len: int, seed: int, memory: float | None, load: bool
    ) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        kind, _, index = device.partition(":")
        if kind == "cuda":
            settings = dict(dtype="bfloat16", device_ids=[int(index or 0)], gpu_memory_utilization=memory)
        else:
            # What starts fastest: one process beside this one, nothing compiled. Compiling gains less than it takes.
            settings = dict(
                dtype="float32",
                enforce_eager=True,
                distributed_executor_backend="uni",
                enable_prefix_caching=False,  # its blocks of 128 tokens are longer than most prompts here
                kv_cache_memory_bytes=2**30,
            )
        args = AsyncEngineArgs(
            model=model,
            seed=seed,
            max_model_len=max_model_len,
            load_format="auto" if load else "dummy",
            # Of two tied matrices vLLM repacks but one on the CPU; untied it takes both, which the trainer keeps equal.
            hf_overrides={} if load else {"tie_word_embeddings": False},
            max_num_seqs=MAX_IN_FLIGHT[kind],
            logprobs_mode="processed_logprobs",
            scheduling_policy="priority",
            worker_extension_cls="weights.StagingReader",
            disable_log_stats=True,
            **settings,
        )
        if self._ending:
            return
        self.engines.append(Engine(device, AsyncLLM.from_engine_args(args)))

    async def _call_all(self, method: str, *arguments) -> None:
        calls = (engine.llm.collective_rpc(method, args=arguments) for engine in self.engines)
        await asyncio.wait_for(asyncio.gather(*calls), RPC_SECONDS)

    async def _request(self, engine: Engine, prompt: dict, params, priority: int):
        """The final output of a request; a lower priority goes first."""
        stream = engine.llm.generate(prompt, params, str(next(self.requests)), priority=priority)
        return [output async for output in stream][-1]

    @contextlib.contextmanager
    def _in_flight(self, engine: Engine, n: int) -> Iterator[None]:
        self._busy_since = self._busy_since or time.perf_counter()
        engine.in_flight += n
        try:
            yield
        finally:
            engine.in_flight -= n
            if not any(e.in_flight for e in self.engines):
                self._busy, self._busy_since = self.busy_seconds, None


def die_with_parent() -> None:
    """Let Linux end this process when the one that started it ends, however that does."""
    PR_SET_PDEATHSIG = 1  # sent when the thread that started this process ends
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _environment(cores: set[int] | None, engines: int) -> Iterator[None]:
    """What vLLM and the processes it starts read from the environment.

    On the CPU the engines are confined to their cores, which they share evenly, so that the trainer keeps its own.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    before = os.sched_getaffinity(0)
    if cores is not None:
        wanted |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the executor "uni" on the CPU
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, len(cores) // engines)),
        }
        os.sched_setaffinity(0, cores)
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send standard output and error to a file, those of the processes started meanwhile for good."""
    with path.open("a") as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
