"""The process of an engine, the only place that imports vLLM: requests in, finished responses out, new weights between
two steps.

It is vLLM's `LLMEngine` in a loop. Outputs are final ones only, without text, and without log-probabilities unless the
objective reads them. Requests wait here and are admitted as sequences end, so that the engine is full however long they
are, and a response has the version of the weights that begin it.
"""

import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from buffer import Response
from search.process import begin, unname_locks
from search.weights import open_flat, views_of

if TYPE_CHECKING:
    from search.engine import EngineSettings

FINAL = dict(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def serve(pipe, settings: "EngineSettings") -> None:
    """Run an engine until the program ends. What cannot go on is sent as call 0, which `Engine.start` waits for."""
    begin(settings.log)
    outbox: SimpleQueue = SimpleQueue()  # sent by a thread: if both ends waited to send, none would receive
    sender = threading.Thread(target=lambda: [pipe.send(message) for message in iter(outbox.get, None)])
    sender.start()
    work(pipe, outbox.put, settings)
    outbox.put(None)
    sender.join()


def work(pipe, send: Callable, settings: "EngineSettings") -> None:
    """Run an engine in this thread. Calls come by `pipe`, answers go by `send`; of call 0 first, when it is ready."""
    unname_locks()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core runs in this process
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if settings.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        os.sched_setaffinity(0, settings.cores or os.sched_getaffinity(0))
        torch.set_num_threads(settings.threads)
    try:
        # As LLM, it has up to 16,384 tokens in a step, by the GPU's name and memory; an engine by itself has 2,048.
        engine = LLMEngine.from_engine_args(engine_args(settings), UsageContext.LLM_CLASS)
        worker = Worker(pipe, send, engine, settings.slots)
        send((0, None, None))
        worker.loop()
    except BaseException as error:
        traceback.print_exc()
        send((0, None, f"{type(error).__name__}: {error}"))


def engine_args(settings: "EngineSettings") -> EngineArgs:
    """The arguments of vLLM's engine."""
    kind, _, index = settings.device.partition(":")
    if kind == "cuda":
        share = settings.gpu_memory_utilization
        own = dict(dtype="bfloat16", device_ids=[int(index or 0)], gpu_memory_utilization=share, load_format="dummy")
    else:  # what starts fastest: nothing is compiled, which gains less than it takes
        own = dict(
            dtype="float32", enforce_eager=True, distributed_executor_backend="uni",
            kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
            block_size=32,  # tokens: the fewest, so that responses share what is whole blocks of a prompt
            enable_chunked_prefill=False,  # with which the sampler on the CPU fails on a seed of a request's own
            max_num_batched_tokens=max(4096, settings.max_model_len), load_format="unpacked",
        )  # fmt: skip
    if settings.load_weights:
        own["load_format"] = "auto"
    else:  # of two tied matrices vLLM would take one; untied it takes both, which the trainer keeps equal
        own["hf_overrides"] = {"tie_word_embeddings": False}
    return EngineArgs(
        model=settings.model, seed=settings.seed, max_model_len=settings.max_model_len, max_num_seqs=settings.slots,
        logprobs_mode="processed_logprobs", scheduling_policy="priority", disable_log_stats=True, **own,
    )  # fmt: skip


class Worker:
    """What an engine does. `Engine.call` calls `generate` to `abort`, with the number of the call first."""

    def __init__(self, pipe, send: Callable, engine: LLMEngine, slots: int):
        self.pipe, self.send, self.engine, self.slots = pipe, send, engine, slots
        self.version = 0  # of the weights
        self.waiting: deque[tuple[int, list[int], SamplingParams]] = deque()  # requests that vLLM does not have yet
        self.versions: dict[int, int] = {}  # of the weights that began a request, by its call

    def loop(self) -> None:
        """Serve calls between steps of the engine, until the pipe is closed."""
        while True:
            idle = not self.waiting and not self.engine.has_unfinished_requests()
            while self.pipe.poll(None if idle else 0):
                call, method, arguments = self.pipe.recv()
                self._attempt(getattr(self, method), call, *arguments)
                idle = False
            while self.waiting and self.engine.get_num_unfinished_requests() < self.slots:
                self._attempt(self._admit, *self.waiting.popleft())
            for output in self.engine.step():
                self._finish(output)

    def generate(self, call: int, prompt: list[int], sampling: dict) -> None:
        """Responses to a prompt's tokens; `sampling` has vLLM's own settings, `n` among them."""
        self.waiting.append((call, prompt, SamplingParams(**sampling, flat_logprobs=True, **FINAL)))

    def prompt_logprobs(self, call: int, tokens: list[int]) -> None:
        """Log-probability of each token but the first [T-1], at temperature 1. It is the next that vLLM begins."""
        self._admit(call, tokens, SamplingParams(max_tokens=1, prompt_logprobs=0, **FINAL), priority=-1)

    def open_weights(self, call: int, handle: dict) -> None:
        """Open the trainer's staging tensor."""
        self.staged = dict(views_of(open_flat(handle), handle["layout"]))
        self.send((call, None, None))

    def load_weights(self, call: int, version: int, handle: dict | None = None) -> None:
        """Load the staged weights, or those of another handle: sequences in flight go on under the new ones.

        Plain `load_weights` is a copy, a fraction of what vLLM's layerwise reloading takes, and right for dense models,
        which `run.policy.check_policy` sees to, and `Searcher.check_agreement`.
        """
        weights = self.staged if handle is None else dict(views_of(open_flat(handle), handle["layout"]))
        self.engine.apply_model(lambda model: load(model, dict(weights)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trainer may write the staging tensor again
        self.version = version
        self.send((call, None, None))

    def running(self, call: int) -> None:
        """Sequences in flight, from the next step on."""
        requested = self.engine.get_num_unfinished_requests() + sum(params.n for _, _, params in self.waiting)
        self.send((call, min(self.slots, requested), None))

    def abort(self, _: int, call: int) -> None:
        """Abort a request."""
        self.waiting = deque(each for each in self.waiting if each[0] != call)
        if self.versions.pop(call, None) is not None:
            self.engine.abort_request([str(call)])

    def _attempt(self, method: Callable, call: int, *arguments) -> None:
        try:
            method(call, *arguments)
        except Exception as error:
            self.send((call, None, f"{type(error).__name__}: {error}"))

    def _admit(self, call: int, tokens: list[int], params: SamplingParams, priority: int = 0) -> None:
        # Salted with the version, the prefix cache never serves keys and values of older weights.
        prompt = tokens_input(tokens, cache_salt=str(self.version))
        self.engine.add_request(str(call), prompt, params, priority=priority)
        self.versions[call] = self.version

    def _finish(self, output: RequestOutput) -> None:
        call = int(output.request_id)
        version = self.versions.pop(call)
        if output.prompt_logprobs is not None:
            rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            self.send((call, np.array([row[token].logprob for token, row in rows]), None))
            return
        responses = [
            Response(
                np.array(each.token_ids, dtype=np.int32),
                finished=each.finish_reason == "stop",
                version=version,
                logprobs=each.logprobs and np.array(each.logprobs.logprobs, dtype=np.float32),
            )
            for each in output.outputs
        ]
        self.send((call, responses, None))


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Let vLLM's model load weights that have transformers' names."""
    if not (hasattr(model, "lm_head") or hasattr(model, "language_model")):
        weights.pop("lm_head.weight", None)  # Gemma 2 has the tied embeddings alone
    model.load_weights(weights.items())


@register_model_loader("unpacked")
class UnpackedLoader(DummyModelLoader):
    """Random weights, in the layout of checkpoints.

    On the CPU vLLM packs weights for oneDNN and frees the originals: nothing would be left to copy new ones to.
    """

    def load_model(self, *arguments, **settings) -> torch.nn.Module:
        """The model."""
        model = super().load_model(*arguments, **settings)
        for module in model.modules():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = torch.nn.functional.linear
        return model

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        """Make them."""
        super().load_weights(model, model_config)
        for module in model.modules():
            module._cpu_skip_gemm_dispatch = True  # vLLM's own way to leave a linear layer as it is
