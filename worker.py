"""What an engine's process does for ours: it takes weights, tells of responses once, and ends with the program.

vLLM imports this there, and nobody else does: `StagingReader` is its `worker_extension_cls`, `Whole` or `WholeAsync`
its `scheduler_cls`, and `Unpacked` its load format "unpacked".
"""

from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # teaches ForkingPickler CUDA tensors
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

import engine
from weights import view


class StagingReader:
    """The engines' side: vLLM gives these methods to its worker."""

    device: torch.device  # the worker's own
    model_runner: Any

    def ignore_signals(self) -> None:
        """Leave them to the program; vLLM has set handlers of its own meanwhile."""
        engine.ignore_signals()

    def open_staging(self, handle: dict) -> None:
        """Open the trainer's staging tensor."""
        if "ipc" in handle:  # a pickle, but of the program's own, through a socket that is its user's
            self.staged = ForkingPickler.loads(handle["ipc"])
        else:
            dtype = getattr(torch, handle["dtype"])
            self.staged = torch.from_file(handle["path"], shared=True, size=handle["size"], dtype=dtype)
        self.layout = handle["layout"]

    def load_staging(self) -> None:
        """Take the staged weights, between two steps of the engine: sequences in flight go on under the new ones.

        Plain `load_weights` is a copy, a fraction of what vLLM's layerwise reloading takes, and right for dense models;
        `compare` refuses the others.
        """
        self.model_runner.get_model().load_weights(view(self.staged, self.layout))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the trainer may write the staging tensor again


class Whole(Scheduler):
    """vLLM's scheduler, which tells of a response once, when it has ended, where `engine.WHOLE` asks for that.

    vLLM sends each token by itself to the process that asked, which puts them together: for the event loop the work of
    as many messages as there are tokens, and with log-probabilities of three arrays in each.

    Nor does it look for a block where the next token has room in that of the last, as 127 of 128 have on the CPU: vLLM
    finds that out at length, for an eighth of a small model's step.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.asked: dict[str, tuple[Request, list[LogprobsLists]]] = {}  # what is to be told once, so far
        manager = self.kv_cache_manager
        self.block_sizes = {each.block_size for each in manager.coordinator.single_type_managers}
        if not manager.enable_caching:  # which has to see each block that is full
            self.allocate_slots, manager.allocate_slots = manager.allocate_slots, self.slots

    def add_request(self, request: Request) -> None:
        """Let a response be generated."""
        if request.sampling_params and request.sampling_params.extra_args == engine.WHOLE:
            self.asked[request.request_id] = request, []
        super().add_request(request)

    def slots(self, request: Request, tokens: int, *arguments, **settings) -> KVCacheBlocks | None:
        """The blocks that so many more tokens of a request need; None where there are too few."""
        place = request.num_computed_tokens
        room = all(0 < place % size <= size - tokens for size in self.block_sizes)
        if room and request.status == RequestStatus.RUNNING:
            return self.kv_cache_manager.empty_kv_cache_blocks
        return self.allocate_slots(request, tokens, *arguments, **settings)

    def finish_requests(self, *arguments, **settings):
        """End responses from outside."""
        ended = super().finish_requests(*arguments, **settings)
        self.asked = {name: asked for name, asked in self.asked.items() if name in self.requests}
        return ended

    def update_from_output(self, *arguments, **settings) -> dict[int, EngineCoreOutputs]:
        """What is to be told after a step, by client."""
        told = super().update_from_output(*arguments, **settings)
        for each in told.values():
            each.outputs = [output for output in each.outputs if self.complete(output)]
        return {i: each for i, each in told.items() if each.outputs or each.finished_requests or each.scheduler_stats}

    def complete(self, output: EngineCoreOutput) -> bool:
        """Whether an output is to be told; what ends a response gets all of it."""
        if output.request_id not in self.asked:
            return True
        request, logprobs = self.asked[output.request_id]
        if output.new_logprobs:
            logprobs.append(output.new_logprobs)
        if output.finish_reason is None:
            return False
        del self.asked[output.request_id]
        output.new_token_ids = list(request.output_token_ids)
        if logprobs:
            columns = zip(*(each[:3] for each in logprobs), strict=True)
            output.new_logprobs = LogprobsLists(*map(np.concatenate, columns))
        return True


class WholeAsync(Whole, AsyncScheduler):
    """The same of vLLM's scheduler that is a step ahead of a GPU."""


@register_model_loader("unpacked")
class Unpacked(DummyModelLoader):
    """Random weights, in the layout of checkpoints.

    On the CPU vLLM packs weights for oneDNN and throws the originals away: then nothing is left to copy new ones to,
    and all must be packed anew with each sync.
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
