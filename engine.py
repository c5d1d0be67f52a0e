"""vLLM engines: each a process that is started, asked, given weights, and ended.

On a GPU vLLM spawns it. On the CPU it is forked from a process that has imported vLLM, which takes five times as long
as starting does, beside what else this one had to do; it inherits what a spawned one would.
"""

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import _forkserver, ensure_running
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from machine import confined
from screen import Failure

MAX_IN_FLIGHT = {"cuda": 512, "cpu": 256}  # sequences of an engine: on CUDA the captured graphs end there
RANDOM_WEIGHTS = {"cuda": "dummy", "cpu": "unpacked"}  # vLLM's load formats: worker.py has the latter
SCHEDULER = {"cuda": "worker.WholeAsync", "cpu": "worker.Whole"}
WHOLE = {"whole": True}  # `extra_args` of sampling parameters: that scheduler is to tell of each response once
PROGRAM = "TBA_PROGRAM"  # in the environment of what is started for engines: the process that started it
AHEAD = ["engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "worker"]  # is imported before engines fork
CPU_CACHE = 2**30  # bytes of keys and values that an engine on the CPU holds
CALL_SECONDS = 300  # for an engine to answer a call

spawning = asyncio.Lock()  # held while the environment and the output are what the next process is to inherit


@dataclass(slots=True, eq=False)
class Engine:
    """A vLLM engine, and how many sequences it has in flight."""

    device: str
    llm: Any  # vllm.v1.engine.async_llm.AsyncLLM
    in_flight: int = 0
    version: int = 0  # of its weights
    agreed: bool = False  # with the trainer, once
    replacement: asyncio.Task | None = None  # under way since it died

    async def call(self, method: str, *arguments) -> None:
        """Let its worker do something.

        Raises:
            RuntimeError: it died meanwhile.
            Failure: it does not answer.
        """
        await self._unless_it_dies(self.llm.collective_rpc(method, args=arguments))

    async def load_staging(self, version: int) -> None:
        """Let it take the staged weights, between two of its steps; what is in flight goes on with them."""

        async def load() -> None:
            self.version = version  # in the same turn as the call is sent: what is sent after it is begun after it
            await self.llm.collective_rpc("load_staging")

        await self._unless_it_dies(load())

    async def died(self) -> None:
        """Return when all who wait for its answers have been told."""
        if self.llm.output_handler:
            await asyncio.wait({self.llm.output_handler}, timeout=5)

    def end(self) -> None:
        """End its process, at once."""
        if self.llm:
            self.llm.shutdown(timeout=0)

    async def _unless_it_dies(self, call: Awaitable) -> None:
        """Wait for a call; of one to an engine that died vLLM would never say so."""
        call = asyncio.ensure_future(call)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                while not call.done():
                    await asyncio.wait({call}, timeout=0.5)
                    if self.llm.errored:
                        raise RuntimeError("it died during a call")
            call.result()
        except TimeoutError:
            raise Failure(f"the engine on {self.device} lives, but has not answered for {CALL_SECONDS} s") from None
        finally:
            call.cancel()


@dataclass
class Launcher:
    """Starts engines.

    Args:
        model: a Hugging Face folder or hub id, for its architecture and tokenizer.
        max_model_len: longest sequence, prompt and response, in tokens.
        seed: of the sampling; each engine has its own.
        memory: by device, the share of a GPU's memory that its engine takes.
        cores: the CPU cores of engines on the CPU.
        threads: how many engines live at a time.
        log: a file, to which goes what they print.
        load: read the model's weights; else they come through `Engine.load_staging`.
    """

    model: str
    max_model_len: int
    seed: int
    memory: dict[str, float]
    cores: set[int]
    threads: int
    log: Path
    load: bool
    starts: list[Future] = field(default_factory=list)
    ending: bool = False

    def __post_init__(self):
        self.pool = ThreadPoolExecutor(self.threads)  # kept: an engine ends with the thread that started it
        # Our names are unique; random ones cost a system call each, which a sandbox makes dear.
        os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"

    async def start(self, devices: Sequence[str]) -> list[Engine]:
        """An engine on each device, started side by side.

        Raises:
            Failure: vLLM gave up; says why.
        """
        before = set(multiprocessing.active_children())

        def processes() -> int:
            return sum("Engine" in each.name for each in set(multiprocessing.active_children()) - before)

        confined = self.cores if "cpu" in devices else None
        if confined:
            import_ahead()
        async with spawning:
            with _environment(confined, self.threads), _output_to(self.log):
                printed = self.log.stat().st_size
                starts = [
                    self.pool.submit(self._start, device, len(self.starts) + i) for i, device in enumerate(devices)
                ]
                self.starts += starts
                # What the processes inherit, they have once they exist.
                while processes() < len(starts) and not all(start.done() for start in starts):
                    await asyncio.sleep(0.02)
        for start, device in zip(starts, devices, strict=True):
            try:
                await asyncio.wrap_future(start)
            except Exception as error:
                reason = self._reason(printed) or " ".join(str(error).split())
                raise Failure(f"vLLM gave up on {device}: {reason}") from error
        engines = [start.result() for start in starts]
        await asyncio.gather(*(engine.call("ignore_signals") for engine in engines))
        return engines

    def end(self) -> None:
        """End all engines and their processes, those that are starting too."""
        self.ending = True
        while wait(self.starts, timeout=0.1).not_done:
            for starting in multiprocessing.active_children():
                starting.kill()
            if importing := vars(_forkserver)["_forkserver_pid"]:
                os.kill(importing, signal.SIGKILL)
        for engine in [start.result() for start in self.starts if not start.exception()]:
            engine.end()
            engine.llm = None  # or it is shut down once more when the interpreter has gone
        self.pool.shutdown()

    def _start(self, device: str, number: int) -> Engine:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine import utils
        from vllm.v1.engine.async_llm import AsyncLLM

        if self.ending:
            raise RuntimeError("the run ends")
        kind, _, index = device.partition(":")
        if kind == "cuda":
            memory = self.memory.get(device)
            settings = dict(dtype="bfloat16", device_ids=[int(index or 0)], gpu_memory_utilization=memory)
        else:
            utils.get_mp_context = Forking
            # What starts fastest: one process beside this one, nothing compiled. Compiling gains less than it takes.
            settings = dict(
                dtype="float32",
                enforce_eager=True,
                distributed_executor_backend="uni",
                enable_prefix_caching=False,  # its blocks of 128 tokens are longer than most prompts here
                kv_cache_memory_bytes=CPU_CACHE,
                # Its sampler on the CPU dies of a prompt in chunks that has a seed of its own.
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(4096, self.max_model_len),
            )
        args = AsyncEngineArgs(
            model=self.model,
            seed=self.seed + number,
            max_model_len=self.max_model_len,
            load_format="auto" if self.load else RANDOM_WEIGHTS[kind],
            # Of two tied matrices vLLM repacks but one on the CPU; untied it takes both, which the trainer keeps equal.
            hf_overrides={} if self.load else {"tie_word_embeddings": False},
            max_num_seqs=MAX_IN_FLIGHT[kind],
            logprobs_mode="processed_logprobs",
            scheduling_policy="priority",
            scheduler_cls=SCHEDULER[kind],
            worker_extension_cls="worker.StagingReader",
            disable_log_stats=True,
            **settings,
        )
        engine = Engine(device, AsyncLLM.from_engine_args(args))
        for handler in logging.getLogger("vllm").handlers:  # what it says in this process
            if handler.name == "vllm" and isinstance(handler, logging.StreamHandler):
                handler.setStream(self.log.open("a"))
        return engine

    def _reason(self, printed: int) -> str:
        """The last error printed since the log had so many bytes, and what helps where it is memory."""
        text = self.log.read_bytes()[printed:].decode(errors="replace")
        errors = re.findall(r"\w*(?:Error|Exception): .+", text)
        known = [error for error in errors if "initialization failed" not in error]
        if not known:
            return ""
        helps = " (--max-tokens, --gpu-memory-utilization)" if "memory" in known[-1].lower() else ""
        return f"{known[-1]}{helps}; all that it printed is in {self.log}"


class Forked(ForkServerProcess):
    """A process that is forked from the one that `import_ahead` started."""

    inherited: tuple[dict[str, str], set[int], Any]

    def __getstate__(self) -> dict:
        return vars(self) | {"inherited": (dict(os.environ), os.sched_getaffinity(0), DupFd(1))}

    def run(self) -> None:
        """What it is for, with environment, cores and output of the thread that started it."""
        import torch

        environment, cores, output = self.inherited
        belong()
        changed = environment.items() - os.environ.items()  # alone: that of the rest is where the process's title goes
        os.environ.update(dict(changed) | {PROGRAM: os.environ[PROGRAM]})
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        multiprocessing.set_start_method("fork", force=True)  # its locks have no name then, that would outlive it
        file = output.detach()
        os.dup2(file, 1), os.dup2(file, 2)
        super().run()


class Forking(ForkServerContext):
    """Where vLLM gets its processes from."""

    Process = Forked


def import_ahead() -> None:
    """Begin to import what engines on the CPU need, in a process of its own, which ends with the thread that asks.

    It has one thread, so that nothing is lost when it forks.
    """
    multiprocessing.set_forkserver_preload(AHEAD)
    cores = os.sched_getaffinity(0)
    with _environment(cores, len(cores)), _output_to(Path(os.devnull)):
        ensure_running()


def belong() -> None:
    """Let Linux end this process when the one that started it ends, however that does; or at once, if it has."""
    PR_SET_PDEATHSIG = 1  # sent when the thread that started this process ends
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(PROGRAM, os.getppid())):
        os._exit(1)
    os.environ[PROGRAM] = str(os.getpid())  # for those that it starts
    ignore_signals()


def ignore_signals() -> None:
    """Leave Ctrl-C and SIGTERM, which are sent to all, to the program, which ends its engines in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _environment(cores: set[int] | None, engines: int) -> Iterator[None]:
    """What vLLM and the processes it starts read from the environment.

    On the CPU the engines are confined to their cores, which they share evenly, so that the trainer keeps its own.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", PROGRAM: str(os.getpid())}
    if cores is not None:
        wanted |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the executor "uni" on the CPU
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": os.pathsep.join(sys.path),  # what is imported ahead is what this process would import,
            "PYTHONSAFEPATH": "1",  # and not what the current folder may have by the same name
            "OMP_NUM_THREADS": str(max(1, len(cores) // engines)),
        }
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with confined(cores or os.sched_getaffinity(0)):
            yield
    finally:
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


if PROGRAM in os.environ:  # this is a process that is started for engines
    belong()
