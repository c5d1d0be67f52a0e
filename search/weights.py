"""How weights cross from the trainer to the engines.

One flat staging tensor holds a copy of the policy's weights. The engines open it once: as CUDA IPC memory on the
trainer's GPU, or as shared memory of the host. A sync is then one copy by the trainer (`StagedWeights.write`) and one
call to each engine (`Worker.load_weights`), with no serialisation and no file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # registers CUDA tensors with ForkingPickler
from torch import Tensor

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats a token, on average: rounding stays far below


class StagedWeights:
    """A copy of the policy's weights that other processes can read.

    Args:
        layout: (name, shape) of each weight, as of `Trainer.layout`.
        engines: their devices. On the trainer's GPU the copy stays there where all of them are this machine's GPUs.
        dtype: of the trainer's weights.
        device: of the trainer.
    """

    def __init__(self, layout: list, engines: Sequence[str], dtype: torch.dtype = torch.float32, device=CPU):
        self.layout, self.device = layout, device
        gpus, here = ["cpu" not in engine for engine in engines], not any("ray" in engine for engine in engines)
        self.dtype = torch.bfloat16 if all(gpus) else torch.float32
        self.tolerance = TOLERANCE[torch.bfloat16 if any(gpus) or dtype == torch.bfloat16 else torch.float32]
        self.version = 0  # the trainer's step that the copy is of
        self.allocate(all(gpus) and here and device.type == "cuda")

    def allocate(self, share_cuda: bool) -> None:
        """Allocate the copy, on the trainer's GPU or in host memory, and the handle by which others open it."""
        size = sum(math.prod(shape) for _, shape in self.layout)
        self.handle: dict = {"dtype": str(self.dtype).removeprefix("torch."), "size": size, "layout": self.layout}
        if share_cuda:
            self.flat = torch.empty(size, dtype=self.dtype, device=self.device)
            self.handle["ipc"] = bytes(ForkingPickler.dumps(self.flat))
        else:  # memory without a name: it is freed when the last process that has it open ends, however that ends
            self.memory = os.memfd_create("tba-weights")
            os.truncate(self.memory, size * self.dtype.itemsize)
            self.handle["path"] = f"/proc/{os.getpid()}/fd/{self.memory}"
            self.flat = open_flat(self.handle)
        self.views = dict(views_of(self.flat, self.layout))
        self.stream = torch.cuda.Stream(self.flat.device) if share_cuda else None

    @torch.no_grad()
    def write(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the weights, (name, weight) each. On CUDA the copy runs on a stream of its own: see `wait`."""
        self.version = version
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.flat.device))
        with torch.cuda.stream(self.stream):
            for name, weight in weights:
                self.views[name].copy_(weight, non_blocking=self.stream is not None)

    def wait_before_update(self) -> None:
        """Order the GPU's next work, a change of the weights, behind a copy that is under way."""
        if self.stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Wait until the last `write` is done."""
        if self.stream is not None:
            self.stream.synchronize()


def open_flat(handle: dict) -> Tensor:
    """The staging tensor, opened by its handle."""
    if "ipc" in handle:  # a pickle, but of the program's own, through a pipe that nobody else has
        return ForkingPickler.loads(handle["ipc"])
    if "array" in handle:  # which is in Ray's object store
        return torch.from_numpy(handle["array"]).view(getattr(torch, handle["dtype"]))
    return torch.from_file(handle["path"], shared=True, size=handle["size"], dtype=getattr(torch, handle["dtype"]))


def views_of(flat: Tensor, layout: list[tuple[str, list[int]]]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of each weight in a staging tensor."""
    start = 0
    for name, shape in layout:
        end = start + math.prod(shape)
        yield name, flat[start:end].view(shape)
        start = end
