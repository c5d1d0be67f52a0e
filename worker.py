"""What an engine's process does for the trainer: it takes weights, and ends with the program.

vLLM imports this there, and nobody else does: `StagingReader` is its `worker_extension_cls`, `Unpacked` its load format
"unpacked".
"""

import signal
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # teaches ForkingPickler CUDA tensors
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from engine import die_with_parent
from weights import view


class StagingReader:
    """The engines' side: vLLM gives these methods to its worker."""

    device: torch.device  # the worker's own
    model_runner: Any

    def belong(self) -> None:
        """End with the program, however it ends, and not before."""
        die_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):  # are the program's, which ends its engines in order
            signal.signal(number, signal.SIG_IGN)

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
